"""An audit over HTTP equals the same audit of the model behind the server; what a server doesn't take is said."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import pipeline

from hf_iclr import audit_safety
from hf_iclr.trainers.safety_audit.asking.endpoint import OpenAIEndpoint
from hf_iclr.trainers.safety_audit.asking.harm_judge import HarmJudge
from tests.trainers.safety_audit.test_audit import ANSWERS, HARMLESS, PROMPTS, odd, tiny_llama


TEMPLATE = (
    "{% for m in messages %}{{ 'w40 ' if m.role == 'user' else 'w41 ' }}{{ m.content }}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}w41{% endif %}"
)


@pytest.fixture
def tokenizer(word_tokenizer):
    return word_tokenizer.__class__(
        tokenizer_object=word_tokenizer.backend_tokenizer, unk_token="w0", eos_token="w49", chat_template=TEMPLATE
    )


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("hf_iclr.trainers.safety_audit.asking.endpoint.time.sleep", lambda seconds: None)


@contextmanager
def serve(answer):
    """A server that answers `answer(path, body) -> (status, JSON)`; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, found = answer(self.path, {**body, "key": self.headers["Authorization"]})
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def model_server(model, tokenizer, ids_allowed=True, goes_on=True, broken=()):
    """vLLM's behaviour in small: greedy answers, prompt ids, begun answers, a template's arguments; no `top_k`."""
    lock, seen = threading.Lock(), []

    def answer(path, body):
        seen.append((path, body))
        if len(seen) in broken:
            return 503, {"error": "busy"}
        if "top_k" in body:
            return 400, {"error": "top_k is unknown"}
        if path.endswith("/chat/completions"):
            begun = goes_on and body.get("continue_final_message", False)
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=not begun)
            ids = tokenizer(text)["input_ids"]
        elif ids_allowed:
            ids = body["prompt"]
        else:
            return 400, {"error": "prompt must be text"}
        row = torch.tensor([ids])
        with lock:
            new = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=body["max_tokens"], do_sample=False,
                pad_token_id=0,
            )[0, len(ids) :].tolist()  # fmt: skip
        said = tokenizer.decode(new, skip_special_tokens=True)
        choice = {"finish_reason": "length", "text": said, "message": {"role": "assistant", "content": said}}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}}

    return answer, seen


CALL = {
    "harmless_prompts": HARMLESS, "answers": ANSWERS, "judge": odd, "ks": (0, 1, 2), "max_new_tokens": 4,
    "attacks": ["prefill"],
}  # fmt: skip


@pytest.mark.parametrize("ids_allowed", [True, False])
def test_equal_to_the_model_itself(tokenizer, ids_allowed, tmp_path):
    model = tiny_llama(0)
    broken = (1, 5)
    answer, seen = model_server(model, tokenizer, ids_allowed, broken=broken)
    with serve(answer) as url:
        endpoint = OpenAIEndpoint(url, "org/model", api_key="k", concurrency=3, prices=(2.0, 4.0))
        found = audit_safety(endpoint, tokenizer, PROMPTS, out=tmp_path, **CALL)
    expected = audit_safety(model, tokenizer, PROMPTS, **CALL)
    assert [(m.attack, m.setting, m.judged, m.refused, m.texts) for m in found.measures] == [
        (m.attack, m.setting, m.judged, m.refused, m.texts) for m in expected.measures
    ]
    assert found.settings["model"] == "org/model" and found.latency == expected.latency
    assert {body["key"] for _, body in seen} == {"Bearer k"} and all(body["temperature"] == 0 for _, body in seen)
    paths = [path.rsplit("v1/")[1] for number, (path, _) in enumerate(seen, 1) if number not in broken]
    assert ("completions" in paths) and (paths.count("completions") > 3) == ids_allowed
    assert endpoint.calls == 6 + 3 + 4 + 3 and f"{endpoint.calls:,} calls" in endpoint.cost_line()
    cost = (endpoint.prompt_tokens * 2 + endpoint.completion_tokens * 4) / 1e6
    assert f"{cost:.4f} at 2 and 4 a million" in endpoint.cost_line() and cost > 0


def test_what_a_server_does_not_take_is_said(tokenizer):
    answer, _ = model_server(tiny_llama(0), tokenizer, ids_allowed=False, goes_on=False)
    grid = ({"top_k": 5}, {"top_p": 0.5})
    call = {**CALL, "attacks": ["prefill", "decoding"], "decoding_grid": grid}
    with serve(answer) as url:
        report = audit_safety(OpenAIEndpoint(url, "m"), tokenizer, PROMPTS, **call)
    assert report.find("prefill", "1").refused == [None] * 6 == report.find("decoding", "top_k=5").refused
    assert None not in report.find("decoding", "top_p=0.5").refused + report.find("none").refused
    assert report.find("decoding", "every setting").refused == report.find("decoding", "top_p=0.5").refused
    assert any("doesn't go on with an answer" in note for note in report.notes)
    assert any("top_k is unknown" in note for note in report.notes)
    assert report.unmeasured({"min_refusal_at_prefill": 0.0}) and not report.crossed({"min_refusal_at_prefill": 0.0})


def test_thoughts_that_the_server_has_cut(tokenizer):
    message = {"content": "A", "reasoning_content": "T"}
    cut = {"content": None, "reasoning_content": "T"}

    def answer(path, body):
        last = body["messages"][-1]["content"] == "w2"
        return 200, {"choices": [{"message": cut if last else message, "finish_reason": "length" if last else "stop"}]}

    with serve(answer) as url:
        call = {"attacks": ["prefill"], "ks": (0,), "judge": lambda texts: [True] * len(texts)}
        report = audit_safety(OpenAIEndpoint(url, "m"), None, ["w1", "w2"], chat_template_kwargs={"x": 1}, **call)
    assert report.find("none").texts == ["A", ""] and report.find("none").refused == [True, None]
    assert report.find("none", judged="thoughts").texts == ["T", "T"] and report.find("none").unfinished == [1]


def test_what_can_not_be_asked_of_a_server(tokenizer):
    endpoint = OpenAIEndpoint("http://127.0.0.1:9/v1", "m", max_retries=1)
    for options, error, words in (
        ({"attacks": ["gcg"]}, ValueError, "got 'gcg'"),
        ({"base": tiny_llama(0)}, TypeError, "another OpenAIEndpoint"),
        ({"before": OpenAIEndpoint("http://127.0.0.1:9/v1/", "m")}, ValueError, "another model than the audited"),
        ({"attacks": ["decoding"]}, ConnectionError, "got none in 2 attempts"),
    ):
        with pytest.raises(error, match=words):
            audit_safety(endpoint, tokenizer, PROMPTS, **options)
    with pytest.raises(ValueError, match="the model's tokenizer"):
        audit_safety(endpoint, None, PROMPTS)
    with pytest.raises(ValueError, match="an address such as"):
        OpenAIEndpoint("localhost:8000", "m")
    with serve(lambda *_: (401, {"error": "no key"})) as url, pytest.raises(ValueError, match="401.*no key"):
        audit_safety(OpenAIEndpoint(url, "m"), tokenizer, PROMPTS, **CALL)


def test_harm_judge_behind_an_endpoint(tokenizer, tmp_path):
    """It is asked each answer once, also by an audit that goes on; what is no yes or no is no verdict."""
    asked = []

    def answer(path, body):
        text = body["messages"][0]["content"]
        asked.append(text)
        said = "Yes." if "w20" in text else "<think>no</think>**No**" if "w2" in text else "perhaps"
        return 200, {
            "choices": [{"message": {"content": said}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 1},
        }

    with serve(answer) as url:
        judge = HarmJudge(OpenAIEndpoint(url, "judge"))
        assert judge(["w20", "w2", "{prompt}"], ["{answer}", "w9", "w9"]) == [True, False, None]
        assert sum("Request:\n{answer}\n\nAnswer:\nw20" in text for text in asked) == 1  # they arrive in any order
        assert "3 calls, 21 prompt tokens, 3" in judge.cost_line()
        assert judge([], []) == []
        call = {**CALL, "harm_judge": judge}
        report = audit_safety(tiny_llama(0), tokenizer, PROMPTS, out=tmp_path, **call)
        n = sum(text is not None for m in report.measures if m.judged == "joined" for text in m.texts)
        assert len(asked) == 3 + n
        assert report.find("prefill", "1").harmful[0] is True  # its prefix is w20


def test_harm_judge_by_pipelines(word_tokenizer):
    tokenizer = word_tokenizer.__class__(
        tokenizer_object=word_tokenizer.backend_tokenizer, unk_token="w0", pad_token="w0", eos_token="w49"
    )
    generator = pipeline("text-generation", model=tiny_llama(0), tokenizer=tokenizer)
    judge = HarmJudge(generator, max_new_tokens=2)
    assert judge(["w1", "w2"], ["w3", [{"role": "user", "content": "w4"}]]) == [None, None]
    assert judge.cost_line() == "2 answers judged here"

    from transformers import LlamaForSequenceClassification

    config = tiny_llama(0).config
    config.id2label, config.pad_token_id = {0: "fine", 1: "harm"}, 0
    classifier = pipeline("text-classification", model=LlamaForSequenceClassification(config), tokenizer=tokenizer)
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    expected = [row["label"] == "harm" for row in classifier(texts)]
    assert HarmJudge(classifier, harmful_label="harm")(texts, texts) == expected
    with pytest.raises(ValueError, match="one of fine, harm; got None"):
        HarmJudge(classifier)
    with pytest.raises(TypeError, match="Expected an OpenAIEndpoint, or a pipeline"):
        HarmJudge("org/model")
    with pytest.raises(ValueError, match="with {prompt} and {answer}"):
        HarmJudge(generator, question="Is it?")


def test_command(tokenizer, tmp_path, monkeypatch):
    """`hf-iclr audit --endpoint` with a harm judge behind another server: its cost and its exit codes."""
    from typer.testing import CliRunner

    from hf_iclr.cli import app as cli

    monkeypatch.setenv("COLUMNS", "200")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1", "answer": "w20 w21"}\n{"prompt": "w2"}\n')
    answer, _ = model_server(tiny_llama(0), tokenizer)
    no = {"choices": [{"message": {"content": "No"}}]}
    with serve(answer) as url, serve(lambda *_: (200, no)) as judge:
        options = ["--prompts", tmp_path / "p.jsonl", "--attack", "prefill", "--k", "1", "--max-new-tokens", "3"]
        options += ["--endpoint", url, "--tokenizer", tmp_path / "words", "--out", tmp_path / "out"]
        options += ["--harm-judge", judge, "--harm-judge-model", "judge", "--max-harmful", "0.1"]
        result = CliRunner().invoke(cli.app, ["audit", "org/model", *map(str, options)])
        assert result.exit_code == 0 and "kept: max_harmful" in result.output, result.output
        assert "org/model: 3 calls" in result.output and "judge: 3 calls" in result.output
        result = CliRunner().invoke(cli.app, ["audit", "org/model", *map(str, options[:-6]), "--max-harmful", "0.1"])
        assert result.exit_code == 2 and "harm_judge" in result.output, result.output
    result = CliRunner().invoke(cli.app, ["audit", "m", *map(str, options[:6]), "--endpoint", "localhost:1"])
    assert result.exit_code == 2 and "Expected an address such as" in result.output, result.output
