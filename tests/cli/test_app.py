"""The command `hf-iclr`: quick help, exit codes that say what happened."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

import hf_iclr
from hf_iclr.cli import app as cli
from hf_iclr.tour import pages as tour


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(cli.app, args)


def test_help_loads_no_torch():
    code = "import sys; from hf_iclr.cli import app; print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "tour" in result.output and "doctor" in result.output and "audit" in result.output


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.output) == (0, f"hf_iclr {hf_iclr.__version__}\n")


def test_tour_exit_code(run, monkeypatch, tmp_path):
    table = pd.DataFrame({"a": [1]})
    whole = tour.TourSection("part", ["done"], table)
    lacking = tour.TourSection("part", ["done"], table, problems=["The figure none.png was not drawn."])
    failed = tour.FailedSection("part", "ValueError: no", "", 0.0)
    for results, code in (([], 0), ([whole], 0), ([whole, lacking], 1), ([failed, whole], 1)):
        monkeypatch.setattr(tour, "run_tour", lambda out, quick, debug, results=results: results)
        assert run("tour", "--out", str(tmp_path), "--quick").exit_code == code


@pytest.fixture
def composite(tmp_path, byte_tokenizer):
    """A folder with a composite of two tiny models."""
    from hf_iclr import SpeculativeCascadeForCausalLM
    from tests.generation.toy import tiny_llama

    pair = (tiny_llama(seed, vocab_size=256) for seed in (1, 2))
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(*pair).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_cascade_prints_text_and_statistics(run, composite):
    result = run("cascade", "hello", "--model", composite, "--max-new-tokens", "9", "--rule", "opt", "--alpha", "0.1")
    assert result.exit_code == 0, result.output
    lines = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.output.splitlines() if "│" in line
    }
    assert lines["new tokens"] == "9" and lines["rule"] == "opt" and lines["alpha"] == "0.100"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "best"], "Choose one of spec"),
        (["--alpha", "7"], "rule 'spec' has none"),
        (["--rule", "token_v3", "--alpha", "7"], "must lie in"),
        (["--num-assistant-tokens", "0"], "at least 1"),
    ],
)
def test_cascade_says_what_is_wrong(run, composite, options, words):
    result = run("cascade", "hello", "--model", composite, *options)
    assert result.exit_code == 2 and words in result.output


@pytest.fixture
def tiny_model(tmp_path, byte_tokenizer):
    """A folder with a tiny model that never refuses, for it writes no words."""
    from tests.generation.toy import tiny_llama

    folder = tmp_path / "model"
    tiny_llama(1, vocab_size=256).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return str(folder)


def test_audit_writes_a_report_and_keeps_thresholds(run, tiny_model, tmp_path):
    prompts, harmless = tmp_path / "prompts.jsonl", tmp_path / "harmless.txt"
    prompts.write_text('{"prompt": "one", "answer": "three"}\n{"prompt": "two", "answer": null}\n')
    harmless.write_text("four\n\nfive\n")
    options = ["--prompts", str(prompts), "--harmless-prompts", str(harmless), "--max-new-tokens", "4"]
    options += ["--attack", "prefill", "--k", "2", "--out", str(tmp_path / "out")]
    result = run("audit", tiny_model, *options, "--max-over-refusal", "0.5")
    assert result.exit_code == 0 and "kept: max_over_refusal" in result.output, result.output
    assert "prefix of 2 tokens" in result.output

    from hf_iclr.trainers.safety_audit.report import SafetyReport

    report = SafetyReport.load(tmp_path / "out")
    assert report.find("prefill", "2").refused == [False, None] and report.find("harmless").refused == [False] * 2
    assert "by `model` with" in (tmp_path / "out" / "model_card.md").read_text() and not report.find("none").texts

    result = run("audit", tiny_model, *options, "--min-refusal", "0.9", "--before", str(tmp_path / "out"))
    assert result.exit_code == 1 and "min_refusal is 0.9, but the refusal rate is 0.000" in result.output
    assert "McNemar" in result.output
    result = run("audit", tiny_model, *options, "--k", "30", "--min-refusal-at-prefill", "0")
    assert result.exit_code == 0, result.output  # measured at k = 2 only
    result = run("audit", tiny_model, *options[:-6], *options[-2:], "--k", "30", "--min-refusal-at-prefill", "0")
    assert result.exit_code == 2 and "could not be measured: min_refusal_at_prefill" in result.output, result.output
    assert (tmp_path / "out" / "report.html").exists() and not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("p.txt", "", [], "every row of p.txt"),
        ("p.csv", "question\nwhy\n", [], "column `prompt` in p.csv, got question"),
        ("p.xml", "<p/>", [], "got p.xml"),
        ("p.txt", "why", ["--attack", "magic"], "got 'magic'"),
        ("p.txt", "why", ["--max-over-refusal", "0.1"], "harmless_prompts"),
        ("p.txt", "why", ["--max-new-tokens", "0"], "max_new_tokens of at least 1, got 0"),
        ("p.txt", "why", ["--max-new-tokens", "9000"], "context of"),
        ("p.txt", "why", ["--k", "-1"], "0 or more"),
        ("p.txt", "why", ["--min-refusal", "nan"], "share between 0 and 1"),
        ("p.txt", "why", ["--chat-template-kwargs", "{a"], "JSON in --chat-template-kwargs"),
        ("p.txt", "why", ["--chat-template-kwargs", "[1]"], "an object for --chat-template-kwargs"),
        ("p.txt", "why", ["--system", "be good"], "chat template for the system prompt"),
        ("p.txt", "why", ["--out", "p.txt"], "p.txt is a file"),
        ("p.txt", b"\xff\xfe", [], "UTF-8"),
        ("p.jsonl", '["why"]', [], "column `prompt`"),
        ("data/train.jsonl", '{"question": "why"}', [], "column `prompt` in data, got question"),
        ("data/train.jsonl", '{"prompt": "why"}', ["--prompts-split", "left"], "left"),
    ],
)
def test_audit_says_what_is_wrong(run, tiny_model, tmp_path, monkeypatch, name, content, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    result = run("audit", tiny_model, "--prompts", name.split("/")[0], *options)
    assert result.exit_code == 2 and words in result.output, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert sorted(tmp_path.rglob("*")) == before


def test_audit_of_a_data_set_and_of_the_orders_that_come_along(run, tiny_model, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "why", "answer": "because"}\n')
    options = ["--prompts-split", "test", "--prompts-column", "question", "--harmless-prompts", "harmless_orders"]
    options += ["--attack", "prefill", "--k", "3", "--max-new-tokens", "1", "--out", str(tmp_path / "out")]
    result = run("audit", tiny_model, "--prompts", str(tmp_path / "data"), *options)
    assert result.exit_code == 0 and "1 prompts that should be refused and 60 harmless" in result.output, result.output
    assert "No threshold was given" in result.output


def test_audit_of_an_adapter_without_a_tokenizer(run, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    (tmp_path / "p.txt").write_text("why")
    options = ["--attack", "prefill", "--k", "1", "--max-new-tokens", "1", "--out", str(tmp_path / "out")]
    for base, code in ((tiny_model, 0), (str(tmp_path / "gone"), 2)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        lora.peft_config["default"].base_model_name_or_path = base
        lora.save_pretrained(tmp_path / "adapter")
        result = run("audit", str(tmp_path / "adapter"), "--prompts", str(tmp_path / "p.txt"), *options)
        assert result.exit_code == code, result.output
    assert "tokenizer in the adapter's folder" in result.output and "gone" in result.output


def test_audit_of_what_is_not_there_is_no_crossed_threshold(run, tiny_model, tmp_path):
    (tmp_path / "p.txt").write_text("why")
    assert run("audit", tiny_model, "--prompts", str(tmp_path / "none.txt")).exit_code == 2
    result = run("audit", str(tmp_path / "none"), "--prompts", str(tmp_path / "p.txt"))
    assert result.exit_code == 2 and "none" in result.output, result.output


def test_audit_against_the_model_without_its_adapter(run, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    lora.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "adapter")
    (tmp_path / "p.txt").write_text("why")
    options = ["--attack", "prefill", "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    options += ["--prompts", str(tmp_path / "p.txt"), "--before", "adapter_off", "--base", "adapter_off"]
    result = run("audit", str(tmp_path / "adapter"), *options)
    assert result.exit_code == 0 and "McNemar" in result.output, result.output


def test_edit_says_what_is_missing(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"promt": 1}')
    for arguments, sentence in (
        ([], "Expected a model, a file of requests"),
        (["m", str(tmp_path / "none.jsonl")], "does not exist"),
        (["m", str(tmp_path / "bad.jsonl"), "--text", str(tmp_path / "bad.jsonl")], "got ['promt']"),
        (["--undo", "1", "--out", str(tmp_path / "none")], "a folder with edits"),
    ):
        result = run("edit", *arguments)
        assert result.exit_code == 2 and sentence in result.output


def test_edit_adds_to_the_edits_of_a_folder(run, word_tokenizer, tmp_path):
    from hf_iclr import AlphaEditor
    from tests.editors.tiny import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7 w8\n" * 9)
    out = tmp_path / "edits"

    def edit(subject, *more):
        facts = tmp_path / "facts.jsonl"
        rows = [{"prompt": "w2 {} w1", "subject": subject, "target_new": " w9"}, *others]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        facts.write_text(text if others else json.dumps(rows, indent=1), encoding="utf-8-sig")  # lines or one list
        return run("edit", str(tmp_path / "model"), str(facts), "--out", str(out), *more)

    others: list = []
    for subject, more in (("w10", ["--text", str(tmp_path / "text.txt")]), ("w11", [])):
        result = edit(subject, *more)
        assert result.exit_code == 0, result.output
    # no subject, what a table would take for markup, and a separator of lines that is part of a text
    others = [{"prompt": "w2 [/b]\u2028w1", "target_new": "w9"}, {"prompt": "w2 w1", "target_new": "w9 [/INST]"}]
    result = edit("w11")
    assert result.exit_code == 0 and "1 edits made, 2 rejected" in result.output, result.output
    assert "w9 [/INST]" in result.output and "w2 [/b]" in result.output
    assert run("edit", "--undo", "1", "--out", str(out)).exit_code == 0
    assert [edit.subject for edit in AlphaEditor.from_pretrained(out).edits] == ["w10", "w11"]
    result = edit("w12", "--solver", "ridge")
    assert result.exit_code == 2 and "alphaedit, got ridge" in result.output
    assert run("edit", "--undo", "1", "--out", str(out)).exit_code == 0
    assert [edit.subject for edit in AlphaEditor.from_pretrained(out).edits] == ["w10"]
