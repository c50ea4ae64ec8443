"""Wrong input of every command: exit code 2, one sentence that names what is wrong, no traceback, no new file."""

import pytest
import typer
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.cli.errors import sentence
from tests.trainers.tiny import tiny_llama
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import tiny_pipe


QUIET = "--use_cpu True --bf16 False --report_to none --save_strategy no --max_steps 1 --disable_tqdm True"
FILES = {
    "text/train.jsonl": '{"text": "w1 w2 w3"}\n' * 4,
    "other/train.jsonl": '{"question": "w1", "reply": "w2"}\n' * 4,
    "broken/train.jsonl": '{"text": "w1"}\n{"',
    "p.txt": "w1",
    "bad.jsonl": "{'a'}\n",
    "columns.jsonl": '{"question": "w1"}\n',
    "pairs.jsonl": '{"prompt": "w1", "chosen": " w2", "rejected": " w3"}\n',
    "state/null.json": '{"log_history": [{"step": null, "eval_logps/chosen": -1.0}]}',
    "state/words.json": '{"log_history": [{"step": 1, "eval_logps/chosen": "low"}]}',
    "state/deep.json": "[" * 100_000,
    "facts.jsonl": '{"prompt": "w1 {}", "subject": "w2", "target_new": " w3"}\n',
    "prompts.json": '{"0": {"1": {"points": [[3, 3]]}}}',
    "lora/adapter_config.json": "{}",
    "empty.jsonl": "",
    "gaps/train.jsonl": '{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1", "completion": null}\n',
    "answers.jsonl": '{"prompt": "w1", "answer": 3}\n',
    "taken/report.html/page": "",
    "cut/config.json": '{"model_type": "llama"}',
    "cut/model.safetensors": "no weights",
}
TRAIN = f"--model_name_or_path model --output_dir out {QUIET} --dataset_name"
WRONG = {
    "nosuch": "nosuch",
    "tour --qick": "--qick",
    "doctor --seems": "--seems",
    "cascade": "Missing argument",
    "cascade w1 --modl sam": "--modl",
    "cascade w1 --rule best": "Choose one of",
    "cascade w1 --alpha much": "'--alpha'",
    "cascade w1 --model ./none": "'./none', which is neither",
    "cascade w1 --model nobody/none": "Could not load 'nobody/none'",
    "cascade w1 --model cut": "cut",
    "cascade w1 --model model --assistant-model ./none": "'./none'",
    "cascade w1 --model model --rule opt": "mixes in a small model",
    **{f"{script} {TRAIN} {end}": words for script in ("sft", "dpo") for end, words in {
        "text --beta_frist 3": "'--beta_frist'",
        "text --max_steps many": "invalid int value: 'many'",
        "text --model_name_or_path ./none": "'./none', which is neither",
        "text --model_name_or_path nobody/none": "'nobody/none'",
        "text --config none.yaml": "none.yaml",
        "text --dataset_train_split left": "'left'",
        "none": "none",
        "nobody/none": "nobody/none",
        "other": "column or key",
        "broken": "JSON",
    }.items()},
    "run none.py": "none.py",
    "run none.py --with influence:rows.jsonl": "none.py",
    "report none": "none",
    "squeeze nosuch": "nosuch",
    "squeeze report none.json": "none.json",
    "squeeze report bad.jsonl": "bad.jsonl",
    "squeeze replay state/null.json": "None",
    "squeeze replay state/words.json": "found none",
    "squeeze replay state/deep.json": "deep.json",
    "squeeze audit ./none pairs.jsonl": "'./none'",
    "squeeze audit model none": "none",
    "squeeze audit model columns.jsonl": "prompt, chosen, rejected",
    "squeeze influence model columns.jsonl": "prompt, chosen, rejected",
    "squeeze influence model pairs.jsonl --count 0": "'--count'",
    f"sft {TRAIN} text --safety_dataset_name columns.jsonl": "columns prompt, harmful, refusal",
    f"sft {TRAIN} text --safety_dataset_name empty.jsonl": "rows in 'empty.jsonl', got an empty file",
    f"sft {TRAIN} text --output_dir p.txt": "p.txt is a file",
    f"sft {TRAIN} text --config": "a file after --config",
    f"sft {TRAIN} gaps": "'completion', row 1 has none",
    f"sft {TRAIN} text --gradient_accumulation_steps 0": "gradient_accumulation_steps",
    "audit model": "--prompts",
    "audit model --prompts none.txt": "none.txt",
    "audit model --prompts bad.jsonl": "line 1 of bad.jsonl",
    "audit model --prompts columns.jsonl": "column `prompt`",
    "audit ./none --prompts p.txt": "'./none'",
    "audit model --prompts p.txt --before nobody/none": "nobody/none",
    "audit model --prompts answers.jsonl": "answer in row 0 of answers.jsonl, got 3",
    "audit model --prompts p.txt --out /proc/none": "nothing can be written to /proc",
    "audit model --prompts p.txt --out taken": "report.html is a folder",
    "audit model --prompts p.txt --out dead": "dead is a dead link",
    "audit model --prompts p.txt --before ./model/": "'model' twice",
    "audit model --prompts p.txt --base adapter_off": "adapter_config.json",
    "audit model --prompts p.txt --min-refusal 3": "min_refusal",
    "edit --undo 1 --out none": "a folder with edits",
    "edit ./none facts.jsonl --text p.txt --out out": "'./none'",
    "edit model bad.jsonl --text p.txt --out out": "line 1 of bad.jsonl",
    "edit model columns.jsonl --text p.txt --out out": "got ['question']",
    "edit model facts.jsonl --text none.txt --out out": "none.txt",
    "edit model facts.jsonl --statistics nobody/none --out out": "nobody/none",
    "edit model facts.jsonl --text p.txt --out lora": "with another adapter",
    "edit model facts.jsonl --text p.txt --solver best --out out": "'best'",
    "segment none.mp4 --point 0:1:3,3 --model sam --out out": "none.mp4",
    "segment p.txt --point 0:1:3,3 --model sam --out out": "p.txt",
    "segment park.mp4 --point 0:1:3,3 --model ./none --out out": "'./none'",
    "segment park.mp4 --point 0:1:3,3 --model model --out out": "model",
    "vos none --out out": "none",
    "vos text --out out --model sam": "text",
    "train-sam2 none.yaml": "none.yaml",
    "train-sam2 p.txt": "YAML",
    "train-sam2 --data none --output_dir out": "none",
    "train-sam2 --data text --modl sam": "'--modl'",
    "annotate none --out out": "none",
    "annotate text --out out --model sam": "text",
    "annotate park.mp4 --out out --model ./none": "'./none'",
    "annotate-ui none.mp4 --model sam": "none.mp4",
    "annotate-ui park.mp4 --model nobody/none": "nobody/none",
    "annotate-ui park.mp4 --model sam --port 99999": "port",
    "inpaint park.mp4": "one of --masks and --prompts",
    "inpaint park.mp4 --masks none.json": "none.json",
    "inpaint park.mp4 --masks bad.jsonl": "bad.jsonl",
    "inpaint park.mp4 --prompts columns.jsonl --model sam": "'question'",
    "inpaint park.mp4 --prompts prompts.json --model ./none": "'./none'",
    "inpaint park.mp4 --prompts prompts.json --model sam --pipeline ./none": "./none",
    "inpaint park.mp4 --prompts prompts.json --model sam --mode best": "'best'",
}  # fmt: skip


COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    """A language model, a segmenter, a film, and files that fit no command."""
    folder = tmp_path_factory.mktemp("wrong")
    tiny_llama().save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    tiny_pipe().save_pretrained(folder / "sam")
    write_video(folder / "park.mp4", smooth(3))
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "dead").symlink_to("nowhere")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return lambda text: CliRunner().invoke(cli.app, text.split())


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text.replace(TRAIN, "..."))
def test_what_is_wrong_is_said_in_a_sentence(run, folder, text):
    files = sorted(folder.rglob("*"))
    result = run(text)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and WRONG[text] in last and "Traceback" not in result.output, result.output
    assert last.startswith("hf-iclr") and len(last.split()) > 4 and sorted(folder.rglob("*")) == files


def test_without_a_command_there_is_help(run):
    result = run("")
    assert "Usage: " in result.output and "audit" in result.output and "Traceback" not in result.output
    assert not isinstance(result.exception, ValueError)


def test_every_command_is_refused_something():
    assert COMMANDS.keys() < {text.split()[0] for text in WRONG}


@pytest.mark.parametrize(
    "text",
    [
        "--debug cascade w1 --model ./none",
        "cascade --debug w1 --model ./none",
        "audit model --prompts none.txt --debug",
        "train-sam2 none.yaml --debug",
        f"sft {TRAIN} text --beta_frist 3 --debug",
    ],
)
def test_debug_shows_the_traceback(run, text):
    result = run(text)
    assert result.exit_code == 2 and "Traceback" in result.stderr and "hf-iclr" in result.stderr.splitlines()[-1]


def test_the_debug_of_transformers_keeps_its_value(run):
    result = run(f"sft {TRAIN} none --debug underflow_overflow")
    assert result.exit_code == 2 and "Traceback" not in result.stderr and "'none'" in result.stderr.splitlines()[-1]


def test_a_process_that_failed_has_said_why():
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    error = ChildFailedError("hf_iclr", {0: ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="none")})
    assert sentence(error) == "Expected every process to end well, one failed: what it said stands above."


def test_an_interruption_is_no_error(run, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_iclr.generation.cascade_call.complete_options", interrupt)
    result = run("cascade w1")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"sft", "dpo", "train-sam2"}))  # whose help is TRL's
def test_help_is_rendered_as_written(run, name):
    command = COMMANDS[name]
    shown = run(f"{name} --help").output.split()
    for written in (command.help, *(option.help for option in command.params if option.help)):
        words = written.split()
        assert any(shown[start : start + len(words)] == words for start in range(len(shown))), written
