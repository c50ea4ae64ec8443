from .editor import ConceptEditor

__all__ = [
    "ConceptEditor",
]
