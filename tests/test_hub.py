"""What each part pushes: a card that says what it is and how to use it, without a word of this machine."""

import copy
import pickle
import re

import pytest
from huggingface_hub import DatasetCard, ModelCard

from hf_iclr.hub import HERE, HubMixin, pretrained_folder, repository_name
from tests.editors.tiny import ENDING, quick_config, tiny_model, tiny_statistics


SETUP = """
    import pandas as pd, torch, hf_iclr
    from hf_iclr import *
    from pathlib import Path
    from huggingface_hub import HfApi, hf_hub_download
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    from tests.editors.tiny import ENDING, quick_config, tiny_statistics
    large, small = {large!r}, {small!r}
    for name in {pushed!r}:
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=str(Path({root!r}) / "secret"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(large), AutoTokenizer.from_pretrained(large)

    def edited():
        model = AutoModelForCausalLM.from_pretrained(large)
        editor = AlphaEditor(model, tokenizer, quick_config(), tiny_statistics(model, tokenizer, layers=[1, 2]))
        editor.edit(ENDING, batch_size=2, progress=False)
        return editor

    def frozen(count):
        rows = pd.DataFrame(dict(step=1, index=range(count), value=0.5, tokens=3))
        return DataShapleyResult(rows, pd.DataFrame(dict(step=[1], loss_validation=[2.0])))
"""
COMPOSITE = "SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small"
DRAFT = "build_draft_model(model, tokenizer, ['w1 w2 w3 w4 ' * 8] * 8, 1, 20)"
# what is pushed, how it is loaded, its base models on the Hub, its paper and a word that says what it is
CASES = {
    "composite": (f"{COMPOSITE}, cascade_rule='opt')", "AutoModelForCausalLM.from_pretrained(repo)", 2, "2405.19261",
                  "Rule `opt`"),
    "reference": (f"{COMPOSITE}, as_reference=True)", "AutoModelForCausalLM.from_pretrained(repo)", 2, "2405.19261",
                  "no weights"),
    "draft": (DRAFT, "AutoModelForCausalLM.from_pretrained(repo)", 1, "2405.19261", "20 frequent tokens"),
    "composite-pipeline": (f"SpeculativeCascadePipeline(model={COMPOSITE}), tokenizer=tokenizer)",
                           "pipeline('speculative-cascade', model=repo, trust_remote_code=True)", 2, "2405.19261",
                           "cascade of"),
    "pair-pipeline": ("pipeline('speculative-cascade', model=large, assistant_model=small)",
                      "pipeline('speculative-cascade', model=repo, assistant_model=small, trust_remote_code=True)", 1,
                      "2405.19261", "cascaded with"),
    "editor": ("edited()", "assert len(AlphaEditor.from_pretrained(repo).edits) == 4", 1, "2410.02355", "w1 w2 w3"),
    "merged": ("edited().merge()", "AutoModelForCausalLM.from_pretrained(repo)", 1, "2410.02355", "in the weights"),
    "adapters": ("edited().to_peft()", "0", 1, "2410.02355", "as LoRA adapters"),
    "one-adapter": ("edited().to_peft(rank=4)", "AutoModelForCausalLM.from_pretrained(repo)", 1, "2410.02355", "LoRA"),
    "statistics": ("tiny_statistics(model, tokenizer)", "KeyStatistics.from_pretrained(repo)", 1, "2410.02355",
                   "down-projection"),
    "result": ("frozen(3)", "assert len(DataShapleyResult.from_pretrained(repo).rows) == 3", 0, "2406.11011",
               "Shapley"),
}  # fmt: skip


KINDS = dict.fromkeys(CASES, "models") | {"result": "datasets"}


@pytest.fixture(scope="module")
def root(tmp_path_factory, word_tokenizer):
    root = tmp_path_factory.mktemp("private")
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 8  # of what the cards' examples write
    model.save_pretrained(root / "secret")
    word_tokenizer.save_pretrained(root / "secret")
    return root


def pushed_card(hub, name, revision="main"):
    """The card of a repository; a form with blanks is none, and paths of this machine are private."""
    kind = KINDS.get(name, "models")
    text = hub.files(f"tester/{name}", kind, revision)["README.md"].decode()
    assert "More Information Needed" not in text and HERE not in text and "/tmp" not in text
    return (DatasetCard if kind == "datasets" else ModelCard)(text)


def usage(card):
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, "card", "exec")
    return code


def test_from_repositories(hub, root):
    names = ["tester/large", "tester/small"]
    script = SETUP.format(large=names[0], small=names[1], pushed=names, root=str(root))
    for case, (make, load, *_) in CASES.items():
        script += f"""
    repo, made = "tester/{case}", {make}
    url = made.push_to_hub(repo, tags=["mine"], private=True, commit_message="Here", revision="next")
    assert url.oid and repo in url, url
    made.push_to_hub(repo)
    if {case in ("composite", "reference", "merged", "one-adapter")}:  # these are models without their tokenizer
        tokenizer.push_to_hub(repo)
    {load}
    card = Path(hf_hub_download(repo, "README.md", repo_type="{KINDS[case][:-1]}")).read_text()
    exec(card.split("```python\\n")[1].split("```")[0], {{}})
    """
    hub.run(script)
    for case, (_, _, bases, paper, words) in CASES.items():
        card, branch = (pushed_card(hub, case, revision) for revision in ("main", "next"))
        named = getattr(card.data, "base_model", None) or []
        assert ([named] if isinstance(named, str) else named) == names[:bases], case
        assert f"https://huggingface.co/papers/{paper}" in card.text and words in card.text, case
        assert card.text.strip().startswith("# ") and f'tester/{case}"' in usage(card), case
        assert card.data.tags and branch.data.tags == [*card.data.tags, "mine"] and branch.text == card.text, case
        repository = hub.repo(KINDS[case], f"tester/{case}")
        assert repository.private and "Here" in repository.titles.values(), case


def test_from_folders(hub, root):
    base = str(root / "secret")
    pushes = "".join(f"    ({make}).push_to_hub('tester/{case}')\n" for case, (make, *_) in CASES.items())
    hub.run(SETUP.format(large=base, small=base, pushed=[], root=str(root)) + "\n" + pushes)
    for case in CASES:
        card = pushed_card(hub, case)
        assert "secret" not in str(card) and not getattr(card.data, "base_model", None), case
        assert "ocal model" in card.text or case == "result", case
        usage(card)


def test_concepts_and_videos(hub):
    hub.run("""
        import hf_iclr
        from hf_iclr import ConceptEditor
        from hf_iclr.tour.demo.pipeline import build_demo_pipeline
        from tests.vision.tiny import tiny_pipe
        base = build_demo_pipeline()
        base.push_to_hub("tester/diffusion")
        base = type(base).from_pretrained("tester/diffusion")
        editor = ConceptEditor(base, ["a dog"])
        editor.edit({"a cat": "a owl"})
        editor.push_to_hub("tester/concepts", tags="mine")
        tiny_pipe().push_to_hub("tester/video", tags="mine")
        import os
        from pathlib import Path
        from unittest.mock import patch
        Path("video").mkdir()
        Path("video/mine.txt").write_text("stays here")
        os.utime("video/mine.txt", (0, 0))
        pipe = tiny_pipe()
        with patch.object(pipe.model, "save_pretrained", wraps=pipe.model.save_pretrained) as saved:
            pipe.save_pretrained("video", push_to_hub=True, repo_id="tester/again", private=True)
        assert saved.call_count == 1 and "tester/again" in Path("video/README.md").read_text()
    """)
    examples = []
    for name, paper in {"concepts": "2410.02355", "video": "2408.00714", "again": "2408.00714"}.items():
        card = pushed_card(hub, name)
        assert f"papers/{paper}" in card.text
        assert ("mine" in card.data.tags) == (name != "again")
        examples.append(f"exec({usage(card)!r}, {{}})")
    hub.run("\n".join(examples))
    assert pushed_card(hub, "concepts").data.base_model == "tester/diffusion"
    assert hub.repo("models", "tester/again").private
    assert {"model.safetensors", "processor_config.json"} <= {*hub.files("tester/again")}
    assert hub.files("tester/again").keys() == hub.files("tester/video").keys()


def test_a_pull_request_leaves_the_branch(hub, root):
    printed = hub.run(
        SETUP.format(large=str(root / "secret"), small="", pushed=[], root=str(root))
        + """
    commit = tiny_statistics(model, tokenizer).push_to_hub("tester/it", create_pr=True, commit_description="Why")
    print(commit.pr_revision, KeyStatistics.from_pretrained("tester/it", revision=commit.pr_revision).tokens > 0)
    """
    )
    assert "refs/pr/1 True" in printed and "README.md" not in hub.files("tester/it")
    pushed_card(hub, "it", "refs/pr/1")


def test_an_edited_model_is_what_it_was_but_for_its_card(word_tokenizer, tmp_path):
    from hf_iclr import AlphaEditor

    model = tiny_model("llama")
    plain = type(model)
    editor = AlphaEditor(model, word_tokenizer, quick_config(), tiny_statistics(model, word_tokenizer, layers=[1, 2]))
    editor.edit(ENDING, progress=False)
    assert editor.merge() is model and type(model).__name__ == plain.__name__ and isinstance(model, plain)
    for number, same in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        same.save_pretrained(tmp_path / str(number))
        card = ModelCard.load(tmp_path / str(number) / "README.md")
        assert card.data.library_name == "transformers" and "# 4 knowledge edits" in card.text
        assert plain.from_pretrained(tmp_path / str(number)).config.architectures == [plain.__name__]
    editor.undo()
    model.add_model_tags("mine")
    model.save_pretrained(tmp_path / "0")
    card = ModelCard.load(tmp_path / "0" / "README.md")
    assert "# 0 knowledge edits" in card.text and "mine" in card.data.tags


@pytest.mark.parametrize("name", ["gpt2", "user/model", "user/model-2.5_b"])
def test_names_of_repositories(name):
    assert repository_name(name) == name


@pytest.mark.parametrize("name", [None, "", "/home/me/model", "./model", "../model", "a/b/c", "~/model", "C:\\model"])
def test_names_of_folders(name):
    assert repository_name(name) is None


def test_a_folder_that_reads_as_a_repository_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "large").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert repository_name("runs/large") is None and repository_name("runs/other") == "runs/other"
    assert pretrained_folder("runs/large").samefile(tmp_path / "runs" / "large")


def test_a_class_without_a_card_says_so(tmp_path):
    class Bare(HubMixin):
        pass

    with pytest.raises(NotImplementedError):
        Bare().save_card(tmp_path)
