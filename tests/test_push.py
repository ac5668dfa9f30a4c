"""Pushing to a stand-in of the Hub: failures half-way, retries, and nothing half-published."""

import time
import traceback

import huggingface_hub.constants
import pytest
from hub_standin import TOKEN, Failure, Hub
from huggingface_hub import HfApi, metadata_load

from vkvtrain.publishing.hub import PushError, push

CARD = "---\nlicense: apache-2.0\n---\n# x\n"
FILES = {
    "README.md": CARD,
    "adapter_config.json": "{}",
    "eviction_config.json": '{"policy": "full"}',
    "custom_generate/generate.py": "pass\n",
    "adapter_model.safetensors": "a" * 5000,
    "tokenizer.json": "t" * 3000,
}
COMPLETE = {*FILES, ".gitattributes"}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts, ours and the client's own
    with Hub() as standin:
        yield standin


@pytest.fixture
def directory(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def pushed(hub, directory, public=True, token=TOKEN, repository="acme/model"):
    return push(directory, repository, public=public, api=HfApi(endpoint=hub.url, token=token))


def check_never_half_published(hub):
    assert all(set(files) == COMPLETE for files in hub.seen_by_others)


def test_a_push_is_one_commit_and_becomes_public_last(hub, directory):
    assert pushed(hub, directory) == f"{hub.url}/acme/model"
    repository = hub.repositories["acme/model"]
    assert {name: repository.files[name].decode() for name in FILES} == FILES
    assert not repository.private
    assert repository.commits == 1
    order = [hub.requests.index(next(r for r in hub.requests if part in r)) for part in ("/commit/", "/settings")]
    assert order == sorted(order)
    assert hub.seen_by_others
    check_never_half_published(hub)


def test_without_public_it_stays_private(hub, directory):
    pushed(hub, directory, public=False)
    assert hub.repositories["acme/model"].private
    assert hub.sent("/settings") == 0
    hub.repositories["acme/model"].private = False  # its owner's choice is left alone later
    pushed(hub, directory, public=False)
    assert not hub.repositories["acme/model"].private


@pytest.mark.parametrize("status", [500, 503, 429, None], ids=str)
@pytest.mark.parametrize("where", ["POST /api/repos/create", "GET .*/tree/", "POST .*/commit/", "PUT .*/settings"])
def test_a_passing_failure_is_tried_again(hub, directory, where, status):
    hub.failures = [Failure(where, status, times=2)]
    pushed(hub, directory)
    assert hub.repositories["acme/model"].commits == 1
    assert not hub.repositories["acme/model"].private
    assert hub.sent(where) >= 3
    check_never_half_published(hub)


def test_a_commit_whose_answer_is_lost_is_not_repeated(hub, directory):
    hub.failures = [Failure("POST .*/commit/", None, times=1, apply=True)]
    pushed(hub, directory)
    assert hub.repositories["acme/model"].commits == 1
    check_never_half_published(hub)


@pytest.mark.parametrize("where", ["POST .*/commit/", "PUT .*/settings"])
def test_what_lasts_is_said_and_the_next_run_continues(hub, directory, where):
    hub.failures = [Failure(where, 500)]
    with pytest.raises(PushError, match="run the same command again, it continues") as error:
        pushed(hub, directory)
    assert TOKEN not in str(error.value)
    assert hub.repositories["acme/model"].private
    assert not hub.seen_by_others
    uploads = hub.sent("PUT /blob/")
    assert uploads == 2
    hub.failures = []
    pushed(hub, directory)
    assert hub.sent("PUT /blob/") == uploads  # nothing large is sent twice
    assert hub.repositories["acme/model"].commits == 1
    assert not hub.repositories["acme/model"].private
    check_never_half_published(hub)


def test_an_upload_that_breaks_off_shows_nothing_and_is_resumed(hub, directory):
    hub.failures = [Failure("PUT /blob/", 403, after=1)]  # the first large file arrives, the second does not
    with pytest.raises(PushError):
        pushed(hub, directory)
    assert len(hub.blobs) == 1
    assert hub.repositories["acme/model"].commits == 0
    hub.failures = []
    before = hub.sent("PUT /blob/")
    pushed(hub, directory)
    assert hub.sent("PUT /blob/") == before + 1
    check_never_half_published(hub)


def test_a_dropped_upload_is_tried_again(hub, directory):
    hub.failures = [Failure("PUT /blob/", None, times=1)]
    pushed(hub, directory)
    assert not hub.repositories["acme/model"].private


def test_weights_of_an_earlier_publication_do_not_stay_beside_the_new_ones(hub, directory):
    pushed(hub, directory)
    (directory / "adapter_config.json").unlink()
    (directory / "adapter_model.safetensors").rename(directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    hub.repositories["acme/model"].files["notes.txt"] = b"the owner's"
    pushed(hub, directory)
    files = set(hub.repositories["acme/model"].files)
    assert not files & {"adapter_config.json", "adapter_model.safetensors"}
    assert files >= {"model.safetensors", "config.json", "notes.txt"}


def test_the_token_is_asked_for_and_never_shown(hub, directory):
    wrong = TOKEN[::-1]
    with pytest.raises(PushError, match="log in with `hf auth login`, or set HF_TOKEN") as error:
        pushed(hub, directory, token=wrong)
    assert wrong not in "".join(traceback.format_exception(error.value))
    assert not hub.repositories


@pytest.mark.parametrize("name", ["model", "a/b/c", "acme/../x"])
def test_a_name_that_is_no_repository_is_refused(hub, directory, name):
    with pytest.raises(ValueError, match=r"user/name|Repo id|repo"):
        pushed(hub, directory, repository=name)
    assert not hub.requests


def test_a_card_that_the_hub_does_not_accept_stops_before_anything_is_uploaded(hub, directory):
    (directory / "README.md").write_text("---\nlicense: [1]\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata"):
        pushed(hub, directory)
    assert hub.sent("PUT /blob/") == 0


def test_the_stand_in_keeps_private_repositories_private(hub, directory):
    pushed(hub, directory, public=False)
    assert not HfApi(endpoint=hub.url, token=False).repo_exists("acme/model")
    assert HfApi(endpoint=hub.url, token=TOKEN).repo_exists("acme/model")
    assert metadata_load(directory / "README.md") == {"license": "apache-2.0"}
