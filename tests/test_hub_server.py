"""The local Hub answers the real huggingface_hub client, so that what is tested as "pushed" went over HTTP."""

import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

from tests.hub_server import TOKEN


PUSH_AND_LOAD = """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.push_to_hub("tester/tiny")
    again = AutoModelForCausalLM.from_pretrained("tester/tiny")
    ids = torch.arange(8)[None]
    print(torch.equal(model(ids).logits, again(ids).logits))
"""


@pytest.mark.slow  # what every part pushes goes the same way
def test_push_to_hub_and_from_pretrained(hub):
    assert hub.run(PUSH_AND_LOAD).strip().endswith("True")
    assert {"config.json", "model.safetensors"} <= set(hub.files("tester/tiny"))
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert any(request.startswith("HEAD") and request.endswith("/config.json") for request in hub.requests)


def test_folder_goes_up_and_comes_down(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    (folder / "empty.txt").write_text("")
    (folder / "deep" / "b.safetensors").write_bytes(bytes(range(256)) * 8)
    answer = json.loads(
        hub.run(f"""
        import json, pathlib
        from huggingface_hub import HfApi, create_repo, hf_hub_download, snapshot_download, upload_folder

        api = HfApi()
        for repo_type in ("model", "dataset"):
            url = create_repo("mine", repo_type=repo_type)
            create_repo("mine", repo_type=repo_type, exist_ok=True)
            commit = upload_folder(repo_id=url.repo_id, folder_path={str(folder)!r}, repo_type=repo_type)
            info = api.repo_info(url.repo_id, repo_type=repo_type, revision=commit.oid, files_metadata=True)
            one = hf_hub_download(url.repo_id, "deep/b.safetensors", repo_type=repo_type, revision=commit.oid)
            all_files = pathlib.Path(snapshot_download(url.repo_id, repo_type=repo_type))
            assert info.sha == commit.oid == all_files.name
            assert pathlib.Path(one).read_bytes() == bytes(range(256)) * 8
            assert (all_files / "a.txt").read_text() == "hello" and (all_files / "empty.txt").read_text() == ""
            again = upload_folder(repo_id=url.repo_id, folder_path={str(folder)!r}, repo_type=repo_type)
            assert again.oid == commit.oid
        print(json.dumps(sorted(api.list_repo_files("tester/mine"))))
        """)
    )
    assert answer == ["a.txt", "deep/b.safetensors", "empty.txt"]


def test_revisions_stay_readable(hub):
    api = HfApi(hub.url, token=TOKEN)
    api.create_repo("tester/versions")
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="f.txt", repo_id="tester/versions")
    api.create_branch("tester/versions", branch="old")
    api.upload_file(path_or_fileobj=b"two", path_in_repo="f.txt", repo_id="tester/versions")
    assert hub.files("tester/versions")["f.txt"] == b"two"
    assert hub.files("tester/versions", revision="old")["f.txt"] == b"one"
    assert api.model_info("tester/versions", revision=first.oid).sha == first.oid
    assert [branch.name for branch in api.list_repo_refs("tester/versions").branches] == ["main", "old"]
    assert len(api.list_repo_commits("tester/versions")) == 3
    assert [file.path for file in api.get_paths_info("tester/versions", ["f.txt", "none"])] == ["f.txt"]
    api.delete_file("f.txt", "tester/versions")
    assert hub.files("tester/versions") == {}
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tester/versions", revision="nowhere")


def test_missing_repository_and_file(hub):
    hub.run("""
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        for call in (lambda: HfApi().model_info("tester/none"), lambda: hf_hub_download("tester/none", "config.json")):
            try:
                call()
            except RepositoryNotFoundError:
                continue
            raise AssertionError("expected RepositoryNotFoundError")
        HfApi().create_repo("tester/here")
        try:
            hf_hub_download("tester/here", "config.json")
        except EntryNotFoundError:
            pass
        else:
            raise AssertionError("expected EntryNotFoundError")
    """)


def test_writing_needs_the_token(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(hub.url, token="hf_wrong").create_repo("tester/closed")
    assert hub.repos == {}
