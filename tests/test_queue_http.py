"""The queue over HTTP: pause, move, retry, history, keys, dry runs and waiting, through a real daemon.

Its worker needs no torch; what the real one does with a cancel is shown in test_engine.py.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.daemon import Daemon
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

SHORT = {"num_inference_steps": 2}
LONG = {"num_inference_steps": 100, "repeat_generation": 10}  # five seconds


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with StubDaemon(tmp_path_factory.mktemp("stub"), make_clips) as running:
        yield running


@pytest.fixture
def paused(stub: Daemon) -> Iterator[Daemon]:
    """The daemon, with an empty queue that starts nothing."""
    stub.post("/queue/pause")
    yield stub
    stub.delete("/queue")
    stub.post("/queue/resume")


@pytest.fixture
def running(stub: Daemon) -> Iterator[int]:
    """A task that runs."""
    task_id = stub.submit(**LONG)["task_id"]
    stub.until(task_id, lambda state: state["phase"])
    yield task_id
    stub.delete(f"/queue/{task_id}")
    stub.finish(task_id)


def patch(daemon: Daemon, task_id: int, body: Any) -> requests.Response:
    return daemon.request("PATCH", f"/queue/{task_id}", json=body)


def listed(daemon: Daemon) -> list[int]:
    return [task["id"] for task in daemon.get("/queue").json()["data"]["tasks"]]


def refused(answer: requests.Response, status: int) -> str:
    """The sentence of a refusal."""
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    detail: str = answer.json()["detail"]
    return detail


# ---- pause and resume


def test_a_paused_queue_says_so_and_starts_again_when_it_is_resumed(stub: Daemon) -> None:
    answer = stub.post("/queue/pause").json()
    assert answer == {"success": True, "message": "Queue paused", "data": {"paused": True}}
    task_id = stub.submit(**SHORT)["task_id"]
    state = stub.get("/queue").json()["data"]
    assert (state["paused"], state["is_processing"], state["current_task_id"]) == (True, False, None)
    assert stub.status(task_id)["status"] == "queued"
    answer = stub.post("/queue/resume").json()
    assert answer == {"success": True, "message": "Queue resumed", "data": {"paused": False}}
    assert stub.finish(task_id)["status"] == "completed"
    assert stub.get("/queue").json()["data"]["paused"] is False


def test_pausing_twice_is_as_pausing_once(paused: Daemon) -> None:
    assert paused.post("/queue/pause").json()["data"] == {"paused": True}


def test_the_running_task_finishes_in_a_paused_queue(stub: Daemon) -> None:
    task_id = stub.submit(num_inference_steps=50)["task_id"]
    stub.until(task_id, lambda state: state["status"] == "processing")
    stub.post("/queue/pause")
    waiting = stub.submit(**SHORT)["task_id"]
    assert stub.finish(task_id)["status"] == "completed"
    assert stub.status(waiting)["status"] == "queued"
    stub.post("/queue/resume")
    assert stub.finish(waiting)["status"] == "completed"


# ---- move


@pytest.mark.parametrize(("position", "told", "order"), [(1, 1, [2, 0, 1]), (2, 2, [0, 2, 1]), (1000, 3, [0, 1, 2])])
def test_a_waiting_task_is_moved(paused: Daemon, position: int, told: int, order: list[int]) -> None:
    ids = [paused.submit()["task_id"] for _ in range(3)]
    answer = patch(paused, ids[2], {"position": position})
    assert answer.json() == {
        "success": True,
        "message": f"Task {ids[2]} is at position {told}",
        "data": {"task_id": ids[2], "position": told},
    }
    assert listed(paused) == [ids[place] for place in order]
    assert paused.status(ids[2])["position"] == told


def test_no_task_is_moved_before_the_running_one(stub: Daemon, running: int) -> None:
    ids = [stub.submit(**SHORT)["task_id"] for _ in range(2)]
    assert patch(stub, ids[1], {"position": 1}).json()["data"]["position"] == 2
    assert listed(stub) == [running, ids[1], ids[0]]
    stub.delete("/queue")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "position: is missing; say at which position it shall wait"),
        ({"position": None}, "position: must be a number"),
        ({"position": 0}, "position: 0 must be between 1 and 1000000"),
        ({"position": -1}, "position: -1 must be between 1 and 1000000"),
        ({"position": "first"}, "position: 'first' must be a whole number"),
        ({"position": ""}, "position: '' must be a whole number"),
        ({"position": 1.5}, "position: 1.5 must be a whole number"),
        ({"position": True}, "position: True must be a whole number"),
        ([1], "The body must be a JSON object"),
    ],
)
def test_a_position_that_is_none_is_400(paused: Daemon, body: Any, sentence: str) -> None:
    task_id = paused.submit()["task_id"]
    assert refused(patch(paused, task_id, body), 400).startswith(sentence)


def test_a_move_without_a_json_body_is_400(paused: Daemon) -> None:
    task_id = paused.submit()["task_id"]
    answer = paused.request("PATCH", f"/queue/{task_id}", data="position=1")
    assert "Content-Type" in refused(answer, 400)


def test_only_a_waiting_task_is_moved(stub: Daemon, running: int) -> None:
    sentence = f"Task {running} is processing; only a waiting task can be moved"
    assert refused(patch(stub, running, {"position": 1}), 400) == sentence


@pytest.mark.parametrize("task_id", [0, 10**6, 10**30])
def test_what_is_not_there_is_404_to_move_to_retry_to_remove_and_to_ask_for(stub: Daemon, task_id: int) -> None:
    answers = [
        patch(stub, task_id, {"position": 1}),
        stub.post(f"/queue/{task_id}/retry"),
        stub.delete(f"/queue/{task_id}"),
        stub.get(f"/status/{task_id}"),
        stub.get(f"/status/{task_id}?wait=1"),
    ]
    assert [refused(answer, 404) for answer in answers] == [f"Task {task_id} not found"] * 5


# ---- retry


def test_a_retry_makes_the_same_again_as_a_new_task(stub: Daemon) -> None:
    old = stub.run(**SHORT, prompt="the same again", seed=7)
    answer = stub.post(f"/queue/{old['task_id']}/retry")
    data = answer.json()["data"]
    assert (answer.status_code, answer.json()["message"]) == (200, "Generation task added to queue")
    assert data["task_id"] > old["task_id"]
    assert data["status_url"] == f"/api/v1/status/{data['task_id']}"
    new = stub.finish(data["task_id"])
    assert (new["status"], new["settings"], new["prompt"]) == ("completed", old["settings"], "the same again")
    assert data["seed"] == new["seed"] == 7
    assert stub.status(old["task_id"]) == old


def test_a_cancelled_task_can_be_retried(paused: Daemon) -> None:
    task_id = paused.submit(**SHORT)["task_id"]
    paused.delete(f"/queue/{task_id}")
    assert paused.post(f"/queue/{task_id}/retry").status_code == 200


def test_what_has_not_ended_can_not_be_retried(paused: Daemon) -> None:
    task_id = paused.submit()["task_id"]
    sentence = f"Task {task_id} is queued; only an ended task can be retried"
    assert refused(paused.post(f"/queue/{task_id}/retry"), 400) == sentence


# ---- history


def test_history_is_newest_first_in_pages(paused: Daemon) -> None:
    ids = [paused.submit()["task_id"] for _ in range(3)]
    first = paused.get("/tasks?limit=2").json()
    second = paused.get("/tasks?limit=2&offset=2").json()
    assert first["message"] == f"Found {first['data']['total']} tasks"
    assert (first["data"]["limit"], first["data"]["offset"], second["data"]["offset"]) == (2, 0, 2)
    seen = [task["task_id"] for page in (first, second) for task in page["data"]["tasks"]]
    assert seen[:3] == ids[::-1]


def test_an_entry_of_the_history_is_the_status(stub: Daemon) -> None:
    state = stub.run(**SHORT)
    assert stub.get("/tasks?limit=1").json()["data"]["tasks"] == [state]


def test_history_can_be_of_one_state(paused: Daemon) -> None:
    waiting, gone = (paused.submit()["task_id"] for _ in range(2))
    paused.delete(f"/queue/{gone}")
    of = {status: paused.get(f"/tasks?status={status}").json()["data"]["tasks"] for status in ("queued", "cancelled")}
    assert [task["task_id"] for task in of["queued"]] == [waiting]
    assert of["cancelled"][0]["task_id"] == gone
    assert {task["status"] for task in of["cancelled"]} == {"cancelled"}


@pytest.mark.parametrize(
    ("query", "field"),
    [("status=done", "status"), ("limit=0", "limit"), ("limit=201", "limit"), ("limit=x", "limit"),
     ("offset=-1", "offset"), (f"offset={10**30}", "offset")],
)  # fmt: skip
def test_a_wrong_question_about_the_history_is_400(stub: Daemon, query: str, field: str) -> None:
    assert refused(stub.get(f"/tasks?{query}"), 400).startswith(f"{field}: ")


# ---- Idempotency-Key


def keyed(daemon: Daemon, key: str, body: Any) -> requests.Response:
    return daemon.post("/generate", body, headers={"Idempotency-Key": key})


def test_the_same_key_and_body_get_the_first_answer_again_and_no_second_task(paused: Daemon) -> None:
    body = {"prompt": "only once"}
    first, again = keyed(paused, "once", body), keyed(paused, "once", body)
    assert again.json() == first.json()
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert listed(paused) == [first.json()["data"]["task_id"]]


def test_a_key_of_another_body_is_400(paused: Daemon) -> None:
    keyed(paused, "mine", {"prompt": "one"})
    sentence = "Idempotency-Key: it was used for another request; take a new key"
    assert refused(keyed(paused, "mine", {"prompt": "two"}), 400) == sentence
    assert len(listed(paused)) == 1


def test_without_a_key_the_same_body_is_another_task(paused: Daemon) -> None:
    assert paused.submit()["task_id"] != paused.submit()["task_id"]


def test_a_refused_request_uses_no_key_up(paused: Daemon) -> None:
    refused(keyed(paused, "refused", {"prompt": ""}), 400)
    assert keyed(paused, "refused", {"prompt": "now right"}).status_code == 200


def test_a_full_queue_still_answers_a_key_again(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "own", make_clips, max_queue=1) as daemon:
        daemon.post("/queue/pause")
        first = keyed(daemon, "full", {"prompt": "a cat"}).json()
        assert keyed(daemon, "another", {"prompt": "a cat"}).status_code == 503
        again = keyed(daemon, "full", {"prompt": "a cat"})
        assert (again.json(), again.headers["Idempotency-Replayed"]) == (first, "true")


def test_a_key_outlives_its_task_and_the_daemon(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "own", make_clips) as daemon:
        first = keyed(daemon, "long", {"prompt": "a cat", **SHORT}).json()
        daemon.finish(first["data"]["task_id"])
        daemon.stop()
        daemon.start()
        again = keyed(daemon, "long", {"prompt": "a cat", **SHORT})
        assert (again.json(), again.headers["Idempotency-Replayed"]) == (first, "true")
        assert daemon.get("/tasks").json()["data"]["total"] == 1


def test_many_clients_with_one_key_make_one_task(paused: Daemon) -> None:
    answers: list[requests.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(keyed(paused, "race", {"prompt": "race"}))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.json()["data"]["task_id"] for answer in answers} == set(listed(paused))
    assert sum("Idempotency-Replayed" in answer.headers for answer in answers) == 7


# ---- dry run


def test_a_dry_run_resolves_everything_and_queues_nothing(paused: Daemon) -> None:
    before = paused.get("/tasks").json()["data"]["total"]
    answer = paused.post("/generate?dry_run=1", {"prompt": "what if", "video_length": 10, "seed": 5})
    data = answer.json()["data"]
    assert (answer.status_code, answer.json()["message"]) == (200, "Dry run: nothing was queued")
    assert (data["task_id"], data["position"], data["status_url"]) == (None, None, None)
    assert (data["settings"]["prompt"], data["settings"]["video_length"], data["seed"]) == ("what if", 9, 5)
    assert any("video_length" in warning for warning in data["warnings"])
    assert paused.get("/tasks").json()["data"]["total"] == before


def test_a_dry_run_tells_the_settings_that_the_task_then_has(paused: Daemon) -> None:
    body = {"prompt": "the same", "num_inference_steps": 3, "seed": 11}
    told = paused.post("/generate?dry_run=true", body).json()["data"]["settings"]
    task_id = paused.post("/generate", body).json()["data"]["task_id"]
    assert paused.status(task_id)["settings"] == told


def test_a_dry_run_refuses_what_would_be_refused(paused: Daemon) -> None:
    assert "resolution" in refused(paused.post("/generate?dry_run=1", {"prompt": "x", "resolution": "63x64"}), 400)


def test_dry_run_off_queues_the_task(paused: Daemon) -> None:
    data = paused.post("/generate?dry_run=0", {"prompt": "x"}).json()["data"]
    assert listed(paused) == [data["task_id"]]


# ---- waiting for the end


def test_a_status_with_wait_answers_once_the_task_has_ended(stub: Daemon) -> None:
    task_id = stub.submit(num_inference_steps=40)["task_id"]
    assert stub.get(f"/status/{task_id}?wait=60").json()["data"]["status"] == "completed"


def test_a_status_with_wait_answers_in_the_end_what_is(paused: Daemon) -> None:
    task_id = paused.submit()["task_id"]
    begun = time.monotonic()
    answer = paused.get(f"/status/{task_id}?wait=1")
    assert answer.json()["data"]["status"] == "queued"
    assert time.monotonic() - begun >= 1


def test_a_status_with_wait_of_an_ended_task_answers_at_once(stub: Daemon) -> None:
    state = stub.run(**SHORT)
    assert stub.get(f"/status/{state['task_id']}?wait=60").json()["data"] == state


def test_a_client_that_goes_away_while_it_waits_cancels_nothing(stub: Daemon) -> None:
    task_id = stub.submit(num_inference_steps=60)["task_id"]
    with pytest.raises(requests.ReadTimeout):
        stub.get(f"/status/{task_id}?wait=60", timeout=0.1)
    assert stub.finish(task_id)["status"] == "completed"


@pytest.mark.parametrize("wait", ["0", "61", "-1", "x", "1.5", "1_0"])
def test_a_wait_that_is_none_is_400(stub: Daemon, wait: str) -> None:
    assert refused(stub.get(f"/status/1?wait={wait}"), 400).startswith("wait: ")


# ---- estimates


def test_the_estimated_wait_is_null_until_something_has_run_and_then_a_number(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "own", make_clips) as daemon:
        daemon.post("/queue/pause")
        first, second = daemon.submit(num_inference_steps=100), daemon.submit(num_inference_steps=100)
        assert (first["estimated_wait"], second["estimated_wait"]) == (0.0, None)
        daemon.post("/queue/resume")
        daemon.finish(second["task_id"])
        daemon.post("/queue/pause")
        waits = [daemon.submit(num_inference_steps=100)["estimated_wait"] for _ in range(3)]
        assert waits[0] == 0.0
        assert 0 < waits[1] < waits[2]
        etas = [daemon.status(task_id)["eta_seconds"] for task_id in listed(daemon)]
        assert etas == [etas[0]] * 3


# ---- several at once


def test_ids_are_in_the_order_of_the_queue_whoever_submits(paused: Daemon) -> None:
    def submit() -> None:
        for _ in range(5):
            paused.submit()

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = listed(paused)
    assert (len(ids), ids) == (30, sorted(set(ids)))
