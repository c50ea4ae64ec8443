"""Facts to edit and text to keep, for the tour, the example and benchmarks without data of their own."""

from datasets import Dataset

from hf_iclr.editors.alpha_edit import EditRequest

from .draft import docstrings


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna",
    "Hungary": "Budapest", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Ireland": "Dublin", "Belgium": "Brussels", "Turkey": "Ankara", "Iran": "Tehran",
    "Iraq": "Baghdad", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cuba": "Havana",
    "Peru": "Lima",
    "Argentina": "Buenos Aires", "Canada": "Ottawa", "Kenya": "Nairobi", "Ukraine": "Kyiv", "Romania": "Bucharest",
}  # fmt: skip


def demo_requests(count: int = len(CAPITALS)) -> list[EditRequest]:
    """
    Capitals moved round by half the list: false by design, easily checked, and known to small models.

    Args:
        count (`int`, *optional*, defaults to 32):
            How many countries.

    Returns:
        `list[EditRequest]`: each with two paraphrases, and three neighbours which are other countries' capitals.
    """
    countries = list(CAPITALS)
    half = len(countries) // 2
    requests = []
    for index, country in enumerate(countries[:count]):
        moved = CAPITALS[countries[(index + half) % len(countries)]]
        # A neighbour's true capital must be this country's, or specificity asks for what was never said: ask for facts
        # about the true capital itself.
        true = CAPITALS[country]
        requests.append(
            EditRequest(
                "The capital of {} is",
                country,
                moved,
                target_true=true,
                paraphrases=(f"The capital city of {country} is called", f"{country}, whose capital is"),
                neighborhood=(f"{true} is a city. The city's name is", f"I flew to {true}. Now I am in"),
                id=f"capital-{country.lower()}",
                source="hf_iclr demo, false by design",
            )
        )
    return requests


def demo_text() -> Dataset:
    """
    Docstrings of installed packages, as a stand-in for text that must not change.

    Returns:
        `datasets.Dataset`: with a column `text`.
    """
    return Dataset.from_dict({"text": docstrings()})
