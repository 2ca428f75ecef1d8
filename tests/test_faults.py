"""Faults that servers of this kind have been seen with: what must never happen, and the tests that prove it does not.

Most proofs lie where their subject is tested; those that belong nowhere else are below the table.
"""

import ast
import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient
from PIL import Image

import wangpd
from engine.api import files
from engine.catalog.models import Model
from engine.files import media
from engine.gpu import worker
from engine.gpu.run.meter import Meter
from engine.job import Cancelled, EngineError, Job, Phase, Result
from engine.workers.local import Engine
from tests import stand_ins
from tests.daemon import ROOT, Daemon
from tests.harness import until
from tests.stand_ins import DEMO, job
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.wire import connected, head

# ----------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Fault:
    """`never` must not be seen, `instead` must; `proofs` are the tests of both, as file::function without `test_`."""

    never: str
    instead: str
    proofs: tuple[str, ...]

    def __str__(self) -> str:
        return self.never[:60]


FAULTS = (
    Fault(
        "a cancel is confirmed while the GPU works on, and the task is completed after all",
        "the work stops within a step or by force, in every phase; cancelled it stays, and no file appears",
        (
            "engine::a_cancel_ends_the_task_in_any_phase_and_the_process_stays",
            "engine::a_worker_that_ignores_a_cancel_is_killed_and_the_next_task_runs",
            "engine::a_task_that_is_deleted_while_it_runs_ends_as_cancelled_and_leaves_nothing",
            "engine::a_task_that_is_deleted_at_once_ends_as_cancelled",
            "queue::a_cancel_that_comes_after_the_last_file_still_ends_as_cancelled",
        ),
    ),
    Fault(
        "a cancel that comes late hits the task after",
        "a cancel names its task",
        (
            "engine::a_cancel_of_an_ended_task_does_not_touch_the_next",
            "engine::the_grace_of_a_cancelled_task_does_not_end_the_next",
            "engine::a_cancel_that_is_left_on_the_board_names_another_task",
        ),
    ),
    Fault(
        "a crash, a restart or a SIGTERM loses the queue, or ids begin at 1 again",
        "every accepted task is there, once and in order, whenever the daemon was killed; ids go on",
        (
            "crash::whatever_moment_the_daemon_is_killed_at",
            "engine::the_queue_goes_on_in_its_order_and_its_ids_go_on",
            "journal::ids_go_on_after_a_restart_with_no_rows_left",
        ),
    ),
    Fault(
        "a failed task stops or empties the queue; running out of memory needs a restart",
        "it fails alone with a sentence that helps, and the next one runs",
        (
            "engine::a_worker_that_is_killed_fails_its_task_alone",
            "engine::any_fault_of_the_worker_becomes_one_sentence",
            "queue::a_failed_task_fails_alone_with_its_sentence",
            "queue::a_fault_of_the_daemon_itself_ends_the_task_and_not_the_queue",
            "faults::a_decode_that_fails_again_ends_in_a_sentence_and_the_next_task_runs",
        ),
    ),
    Fault(
        "the record is written after the start, so that an id which was told is 404",
        "it is on the disk before the answer",
        ("crash::an_accepted_task_is_on_the_disk_before_its_answer", "queue::a_task_is_in_the_file_before_its_answer"),
    ),
    Fault(
        "half a file is listed or served; a whole one can't be had because its task is said to have failed",
        "a file is seen only when it is whole, and then whatever becomes of its task",
        (
            "encode::a_file_is_hidden_until_it_is_whole",
            "encode::publishing_saves_the_bytes_then_the_name",
            "outputs::only_regular_media_files_are_listed",
            "faults::a_finished_file_stays_whatever_becomes_of_its_task",
        ),
    ),
    Fault(
        "ranges are promised and ignored, players can't seek, and a file is read into memory to be sent",
        "206 with the right bytes, 416, If-Range and HEAD; memory does not grow with the file",
        (
            "files_http::a_range_is_206_with_those_bytes",
            "files_http::a_range_outside_the_file_is_416_with_its_size",
            "files_http::a_stale_if_range_gives_the_whole_file",
            "files_http::head_tells_the_same_as_get_without_the_bytes",
            "files_http::memory_does_not_grow_with_the_file",
            "encode::the_index_comes_before_the_pixels",
        ),
    ),
    Fault(
        "the defaults of the schema hide those of the model",
        "only what the client sent wins over them",
        (
            "contract::what_was_not_sent_is_the_models_default",
            "contract::what_was_sent_always_wins",
            "openapi::the_descriptions_name_the_contracts_defaults",
        ),
    ),
    Fault(
        "progress is never set, jumps from 0 to 100, or the queue's list only grows",
        "steps and phases are told as they happen, and an ended task has left the list",
        (
            "generation::progress_and_steps_only_grow_and_reach_their_end",
            "generation::the_phase_is_told_while_it_lasts",
            "queue::tasks_run_one_at_a_time_in_their_order",
        ),
    ),
    Fault(
        "a waiting task is said to run; a task runs for ever",
        "states are true, and a worker that died or hangs is noticed",
        (
            "queue::a_task_goes_from_queued_by_processing_to_completed",
            "engine::a_death_fails_its_task_naming_phase_and_step_and_the_next_runs_in_another_process",
            "engine::a_worker_without_progress_is_ended_by_its_patience",
        ),
    ),
    Fault(
        "progress tells of what runs now, whichever task was asked for",
        "each task has its own",
        ("faults::progress_is_that_of_the_task_that_was_asked_for",),
    ),
    Fault(
        "the time that a task waits is counted as its work",
        "its ETA is the work of its own that lies ahead",
        (
            "queue::the_eta_of_a_waiting_task_counts_no_time_in_the_queue",
            "faults::the_eta_of_a_task_that_waited_is_no_longer_than_its_own_work",
        ),
    ),
    Fault(
        "health is silent while a model loads",
        "it answers, whatever the engine does",
        (
            "engine::health_answers_while_a_model_loads",
            "engine::health_answers_every_time_whatever_the_engine_does",
            "engine::health_answers_while_a_task_is_denoised",
        ),
    ),
    Fault(
        "thumbnails are decoded on the event loop, and anew each time",
        "off the loop; kept by name, time, size and width",
        (
            "faults::a_thumbnail_in_the_making_holds_nobody_up",
            "outputs::a_thumbnail_is_decoded_once",
            "outputs::each_width_has_its_own_thumbnail",
            "outputs::a_changed_file_has_a_new_thumbnail",
        ),
    ),
    Fault(
        "memory of the GPU stays taken after an error or a cancel",
        "it is given back; all of it on request, and after idleness",
        (
            "faults::what_an_ended_task_held_is_free_when_memory_is_given_back",
            "limits::unload_ends_the_generation_process_and_the_next_task_starts_one",
            "limits::idleness_ends_the_generation_process_and_the_next_task_starts_one",
        ),
    ),
    Fault(
        "a retry loses model or pictures; an answer that was lost makes the work twice",
        "a retry keeps everything, and a key brings the same answer again",
        (
            "queue_http::a_retry_makes_the_same_again_as_a_new_task",
            "queue::a_retry_is_a_new_task_with_everything_that_the_old_one_had",
            "queue_http::the_same_key_and_body_get_the_first_answer_again_and_no_second_task",
            "queue_http::a_key_outlives_its_task_and_the_daemon",
        ),
    ),
    Fault(
        "a name leads out of the output folder, by dots, an absolute path, a link, a NUL or a device",
        "404, however it is written",
        (
            "files_http::a_hostile_name_is_404_however_it_is_written",
            "outputs::no_name_raises_or_leads_out_of_the_folder",
            "outputs::a_symbolic_link_finds_nothing",
            "hostile::no_name_at_all_is_a_file",
        ),
    ),
    Fault(
        "a page that someone opens posts a job by a simple request, or by DNS rebinding",
        "JSON must be said, pages of other sites are refused, and so are names that the daemon does not have",
        (
            "security::a_page_of_another_site_changes_nothing",
            "security::what_a_form_can_send_is_no_request_from_anywhere",
            "security::a_form_that_a_page_of_another_site_sends_queues_nothing",
            "security::the_daemon_answers_to_no_other_name",
        ),
    ),
    Fault(
        "a picture or a body that is a bomb, broken or huge takes the server down",
        "400 or 413, and memory stays bounded",
        (
            "limits::a_picture_that_unpacks_to_too_much_is_400_with_bounded_memory",
            "limits::a_large_body_is_not_kept_in_memory",
            "limits::a_body_that_unpacks_to_too_much_is_415_and_is_not_unpacked",
            "media::a_picture_cut_off_anywhere_is_refused",
            "hostile::every_hostile_request_is_refused_with_a_sentence_and_changes_nothing",
        ),
    ),
    Fault(
        "a model of the wrong kind takes a job, and fails after minutes of loading",
        "it is refused at submission, and told what would take it",
        (
            "contract::a_picture_that_the_model_does_not_take_is_400_with_those_that_do",
            "wan_models::an_input_that_a_model_does_not_take_is_refused",
            "weights::a_task_for_a_model_that_is_not_installed_is_refused_with_the_command",
        ),
    ),
    Fault(
        "all steps are done, then the decoding runs out of memory",
        "tiles by the size of the card, and another try in the smallest tiles",
        (
            "plan::tiles_are_for_cards_on_which_whole_frames_do_not_fit",
            "faults::a_decode_that_runs_out_of_memory_is_tried_again_in_tiles",
        ),
    ),
    Fault(
        "the seed that was drawn is nowhere told",
        "it is in the answer, in the status and in the file",
        (
            "contract::a_drawn_seed_is_told_in_the_answer_the_status_and_the_settings",
            "generation::each_file_carries_its_settings_and_its_own_seed",
        ),
    ),
    Fault(
        "a video lacks its settings, or they spoil it",
        "JSON in its comment, which other programs read and players pass over",
        (
            "encode::settings_survive_in_a_video",
            "encode::the_comment_is_read_by_ffmpeg_too",
            "files_http::the_settings_and_the_seed_are_inside_a_generated_file",
        ),
    ),
    Fault(
        "the disk fills up, and the job dies at its end",
        "room is checked before the start, the error is clear, and old files go if that is wished",
        (
            "limits::a_full_disk_is_503_at_submission_and_stores_nothing",
            "limits::a_task_waits_while_the_disk_is_full_at_the_start",
            "limits::only_the_oldest_files_beyond_the_bytes_to_be_kept_are_removed",
            "limits::only_files_older_than_they_are_to_be_kept_are_removed",
            "encode::a_full_disk_ends_a_video_with_one_sentence",
        ),
    ),
    Fault(
        "an unreadable file or folder is 500, an empty answer or an empty list",
        "403, 404 or 503 with a sentence that names the file, or save_path; the others are listed and served",
        (
            "file_faults::a_file_that_the_daemon_may_not_read_is_403",
            "file_faults::a_folder_that_the_daemon_may_not_search_is_503",
            "file_faults::a_folder_that_is_away_is_503_until_it_is_back",
            "file_faults::a_disk_that_fails_is_a_sentence_and_never_a_500",
            "file_faults::a_file_that_cant_be_looked_at_does_not_cost_the_others_their_place",
            "file_faults::a_preview_needs_no_cache",
        ),
    ),
    Fault(
        "a file shrinks while it is sent, and the next answer is taken for its missing bytes",
        "the connection ends; a file that grows is sent as it was announced",
        (
            "file_faults::a_file_that_shrinks_while_it_is_sent_ends_the_connection",
            "file_faults::a_disk_that_fails_while_a_file_is_sent_ends_the_connection",
            "file_faults::a_file_that_grows_while_it_is_sent_is_sent_as_it_was",
            "file_faults::a_file_that_is_replaced_or_removed_while_it_is_sent_is_sent_whole",
        ),
    ),
    Fault(
        "a malformed Range, another unit or several ranges are 416",
        "the whole file; 416 only if no range has a byte of the file",
        (
            "files_http::a_range_that_is_malformed_or_in_another_unit_is_ignored",
            "files_http::several_ranges_of_which_one_is_in_the_file_are_the_whole_file",
            "files_http::a_range_outside_the_file_is_416_with_its_size",
            "files_http::an_empty_file_is_always_whole",
        ),
    ),
    Fault(
        "a download of a name that is not plain ASCII loses its name; a file of an odd time is 500",
        "filename* has the whole name; every time is listed",
        (
            "file_faults::a_file_is_listed_and_saved_under_its_own_name",
            "file_faults::a_file_that_is_not_listed_is_not_served_either",
            "file_faults::a_file_of_any_time_is_listed_and_served",
        ),
    ),
    Fault(
        "one address only; IPv6 without IPv4; no Unix socket; a logged address that can't be opened",
        "lists, both families, Unix sockets and systemd's, each logged as it can be opened",
        (
            "sockets::each_address_of_a_list_answers_on_the_same_port",
            "sockets::the_ipv6_wildcard_serves_both_families_and_knows_an_ipv4_client_by_its_address",
            "sockets::unix_sockets_and_addresses_may_be_mixed",
            "sockets::sockets_of_systemd_are_served_instead_of_host_and_port",
            "sockets::the_logged_address_can_be_opened",
        ),
    ),
    Fault(
        "a start removes a file that is no socket, or the socket of a daemon that runs",
        "only what a dead daemon left is replaced, and at the end only the own socket is removed",
        (
            "sockets::what_is_no_socket_is_never_removed",
            "sockets::a_socket_that_a_daemon_serves_is_in_use",
            "sockets::a_socket_that_a_killed_daemon_left_is_replaced",
            "sockets::another_daemons_socket_in_its_place_stays",
        ),
    ),
    Fault(
        "a client that goes away cancels its work",
        "the work goes on",
        (
            "faults::a_client_that_goes_away_cancels_nothing",
            "queue_http::a_client_that_goes_away_while_it_waits_cancels_nothing",
            "limits::readers_that_do_not_read_cost_no_memory_and_slow_nobody",
        ),
    ),
)

# Seen on wangpd itself. The soak plays what comes from the place, from time and from clients, all at once.
FAULTS_OF_THE_PLACE = (
    Fault(
        "retention deletes a user's own films, or young ones when the clock jumps",
        "only files that wangpd made go, by a clock that can be believed",
        (
            "owner::a_users_own_files_outlive_retention",
            "owner::a_file_with_the_name_of_an_own_one_is_a_users_if_he_wrote_it",
            "owner::only_own_files_count_towards_the_room_that_they_may_take",
            "owner::a_clock_that_jumps_while_the_daemon_runs_deletes_nothing",
            "owner::a_clock_that_jumps_over_a_restart_deletes_nothing",
            "owner::inputs_of_a_request_under_way_are_kept_whatever_the_clock_shows",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "two daemons on one output folder delete each other's files",
        "a folder has one owner, which touches only its own names",
        (
            "owner::a_second_daemon_does_not_start_on_the_same_output_folder",
            "owner::a_daemon_that_comes_after_another_touches_none_of_its_files",
            "owner::daemons_in_folders_of_each_other_leave_each_others_files_alone",
            "owner::a_lock_ends_with_its_process_however_that_ends",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "a full disk, a folder that is away or read-only, a lost card or no process to be had fails all that waits",
        "tasks wait, `ready` says why, and work goes on by itself; what is made is kept until it can be saved",
        (
            "place::tasks_wait_while_the_disk_is_full",
            "place::tasks_wait_while_the_folder_is_read_only",
            "place::tasks_wait_while_the_disk_is_not_mounted",
            "place::tasks_wait_while_the_card_is_gone",
            "place::tasks_wait_while_no_process_can_be_started",
            "place::a_video_that_can_not_be_saved_is_kept_and_saved_later",
            "place::a_video_that_is_made_and_not_saved_outlives_the_daemon",
            "place::auto_is_never_the_cpu_because_a_driver_broke",
            "queue::a_disk_that_fails_for_all_costs_no_attempt",
            "soak::in_all_weathers",
            "soak::every_phase_that_the_machine_allows_is_played",
        ),
    ),
    Fault(
        "a dead CUDA context fails every later task",
        "its process is replaced",
        (
            "place::a_poisoned_device_ends_its_process_and_the_tasks_behind_run_in_another",
            "queue::after_a_fault_of_the_device_it_is_checked_before_the_next_task",
            "queue::a_device_that_stays_broken_gets_no_further_task",
        ),
    ),
    Fault(
        "a client in a long poll makes each stop 10 s, and gets no answer",
        "it is answered at once",
        (
            "stop::clients_that_wait_for_any_task_get_its_state_at_a_stop",
            "stop::a_stop_with_clients_that_wait_takes_no_longer",
            "stop::a_wait_that_begins_during_the_stop_is_answered_at_once",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "a generated client overwrites the model's defaults",
        "it sends what its user said",
        (
            "generated_clients::a_client_of_openapi_python_client_sends_the_prompt_and_nothing_else",
            "generated_clients::a_client_of_openapi_typescript_sends_the_prompt_and_nothing_else",
            "generated_clients::pydantic_models_of_the_document_send_the_prompt_and_nothing_else",
            "openapi::no_client_is_given_a_value_to_send",
        ),
    ),
    Fault(
        "numbers as text, empty fields, latin-1 and encoded bodies are refused with no help",
        "taken, or a sentence that helps",
        (
            "lenient::a_value_as_text_is_taken_for_what_it_means",
            "lenient::an_empty_text_counts_as_left_out",
            "lenient::a_form_of_a_browser_with_everything_left_empty_is_a_request",
            "lenient::a_body_is_read_in_the_charset_that_it_declares",
            "lenient::a_body_that_is_not_in_its_charset_is_400_with_the_place_and_the_remedy",
            "lenient::an_encoded_body_is_415_naming_its_encoding",
            "lenient::a_near_miss_names_the_right_field",
            "lenient::a_slash_too_many_is_forgiven",
        ),
    ),
    Fault(
        "a rollback, or a newer journal, is a traceback or a queue that is set aside",
        "one sentence, and nothing is touched; unknown keys are ignored",
        (
            "versions::a_newer_journal_stops_the_start_with_a_sentence_and_stays",
            "versions::a_rollback_finds_a_journal_that_the_version_before_can_read",
            "versions::the_journal_of_every_older_version_is_taken_up_whole",
            "versions::what_a_neighbouring_version_added_is_ignored",
            "versions::a_waiting_row_that_can_not_be_read_fails_alone_and_is_kept",
            "versions::a_model_that_is_gone_is_said_at_retry",
            "versions::a_picture_that_is_gone_is_said_at_retry_and_in_its_turn",
        ),
    ),
    Fault(
        "SIGHUP costs an attempt, a frozen process is taken for hung, an ETA is negative after a clock jump",
        "an orderly end; one's own sleep is no hang; durations are monotonic",
        (
            "stop::every_signal_that_ends_it_puts_the_task_back_without_counting_the_attempt",
            "stop::a_signal_that_reaches_all_processes_is_an_orderly_end_too",
            "time::a_frozen_daemon_does_not_take_its_sleep_for_a_hang_of_the_worker",
            "time::a_frozen_daemon_does_not_give_files_up_that_are_being_written",
            "time::a_clock_that_jumps_makes_no_time_left_or_wait_absurd",
            "time::the_first_tasks_of_a_model_are_told_rightly_or_not_at_all",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "a picture while the state folder is full is 500; an unreadable folder is 500 with a green `ready`",
        "503, told in `ready`",
        (
            "place::a_full_state_folder_is_503_with_and_without_a_picture",
            "place::a_state_folder_that_can_not_be_written_to_is_503",
            "file_faults::a_folder_that_the_daemon_may_not_search_is_503",
            "file_faults::a_folder_that_is_away_is_503_until_it_is_back",
            "file_faults::a_file_that_the_daemon_may_not_read_is_403",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "a file shrinks while it is sent, and the next answer begins inside it",
        "the connection is closed",
        (
            "file_faults::a_file_that_shrinks_while_it_is_sent_ends_the_connection",
            "file_faults::a_disk_that_fails_while_a_file_is_sent_ends_the_connection",
            "file_faults::a_file_that_grows_while_it_is_sent_is_sent_as_it_was",
        ),
    ),
    Fault(
        "whole files of a cancelled task are there, and nobody is told",
        "`files` of its status lists them",
        (
            "place::a_cancelled_task_lists_the_files_that_were_whole",
            "place::a_task_whose_worker_is_killed_lists_the_files_that_were_whole",
            "queue::a_task_that_is_broken_off_lists_the_files_that_were_whole",
            "soak::in_all_weathers",
        ),
    ),
    Fault(
        "warnings of libraries, leaked semaphores and repeated refusals fill the log",
        "one line a task and the problems; floods are counted",
        (
            "log::the_log_of_an_hour_is_one_line_a_task_and_the_problems",
            "log::no_semaphore_is_left_of_any_process",
            "log::a_flood_of_connections_is_one_line",
        ),
    ),
)


@cache
def functions(file: str) -> set[str]:
    """The names of all test functions of a file of the tests."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("fault", FAULTS + FAULTS_OF_THE_PLACE, ids=str)
def test_every_fault_has_its_proofs(fault: Fault) -> None:
    assert fault.proofs
    for proof in fault.proofs:
        file, _, name = proof.partition("::")
        assert f"test_{name}" in functions(f"test_{file}.py")


# ------------------------------------------------------------------------------------- the daemon, with a quick worker

LONG = {"num_inference_steps": 100, "repeat_generation": 4}
SHORT = {"num_inference_steps": 10}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose worker takes 5 ms a step, and has run once."""
    with StubDaemon(tmp_path_factory.mktemp("house"), make_clips) as running:
        running.run(**SHORT)
        yield running


def test_progress_is_that_of_the_task_that_was_asked_for(house: Daemon) -> None:
    first, second = (house.submit(**fields)["task_id"] for fields in (LONG, SHORT))
    house.until(first, lambda state: state["progress"] > 20)
    waiting = house.status(second)
    assert (waiting["status"], waiting["progress"], waiting["current_step"], waiting["phase"]) == ("queued", 0, 0, None)
    assert waiting["total_steps"] == 10
    house.finish(second)
    assert house.status(first)["progress"] == 100
    assert house.status(first)["current_step"] == 400


def test_the_eta_of_a_task_that_waited_is_no_longer_than_its_own_work(house: Daemon) -> None:
    steps = {"num_inference_steps": 100}  # much more than its file takes, which the first task says little of
    first, second = (house.submit(**fields)["task_id"] for fields in (LONG, steps))
    house.until(first, lambda state: state["status"] == "processing")
    own_s = house.post("/generate?dry_run=1", {"prompt": "a", **steps}).json()["data"]["estimated_seconds"]
    assert house.status(second)["eta_seconds"] <= own_s
    assert house.status(first)["status"] == "processing"
    house.finish(second)


def test_a_finished_file_stays_whatever_becomes_of_its_task(house: Daemon) -> None:
    task_id = house.submit(**LONG)["task_id"]
    mark = f"_t{task_id:06d}-"

    def listed() -> list[str]:
        files = house.get("/outputs").json()["data"]["files"]
        return [file["filename"] for file in files if mark in file["filename"]]

    house.until(task_id, lambda _: listed())
    house.delete(f"/queue/{task_id}")
    assert house.finish(task_id)["status"] == "cancelled"
    clip = (house.folder / "clip.mp4").read_bytes()
    assert listed()
    assert {house.get(f"/download/{name}").content for name in listed()} == {clip}
    assert {path.name for path in house.outputs.iterdir() if mark in path.name} == set(listed())


def test_a_client_that_goes_away_cancels_nothing(house: Daemon) -> None:
    before = house.get("/tasks").json()["data"]["total"]
    body = b'{"prompt": "left alone", "num_inference_steps": 40}'
    with connected(house.url) as channel:
        fields = {"Content_Type": "application/json", "Content_Length": len(body)}
        channel.sendall(head("/api/v1/generate", "POST", **fields) + body)
    task_id = newest(house, before + 1)
    with connected(house.url) as channel:
        channel.sendall(head(f"/api/v1/status/{task_id}?wait=60"))
    assert house.finish(task_id)["status"] == "completed"


def newest(daemon: Daemon, total: int) -> int:
    """The id of the newest task, once there are so many."""
    while (page := daemon.get("/tasks?limit=1").json()["data"])["total"] < total:
        pass
    task_id: int = page["tasks"][0]["task_id"]
    return task_id


# ---------------------------------------------------------------------------------------------------------- thumbnails


@pytest.fixture
async def client(tmp_path: Path, aiohttp_client: Any) -> TestClient[Any, Any]:
    """A client of a daemon in this process."""
    proxies = ("127.0.0.1",)  # so that a test can be several clients
    config = wangpd.Config(save_path=tmp_path / "outputs", state_path=tmp_path / "state", trusted_proxies=proxies)
    made: TestClient[Any, Any] = await aiohttp_client(wangpd.make_app(config))
    Image.new("RGB", (64, 64)).save(tmp_path / "outputs" / "picture.png")
    return made


async def test_a_thumbnail_in_the_making_holds_nobody_up(
    client: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, make = threading.Event(), threading.Event(), media.thumbnail

    def held(file: BufferedReader, width: int) -> bytes:
        begun.set()
        assert go_on.wait(60)
        return make(file, width)

    monkeypatch.setattr(media, "thumbnail", held)
    asked = asyncio.create_task(client.get("/api/v1/preview/picture.png"))
    assert await asyncio.to_thread(begun.wait, 60)
    assert (await client.get("/api/v1/health")).status == 200
    assert not asked.done()
    go_on.set()
    assert (await asked).content_type == "image/jpeg"


@pytest.fixture
def held_previews(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No preview is made until the event is set."""
    go_on, make = threading.Event(), media.thumbnail

    def held(file: BufferedReader, width: int) -> bytes:
        assert go_on.wait(60)
        return make(file, width)

    monkeypatch.setattr(media, "thumbnail", held)
    yield go_on
    go_on.set()


@pytest.mark.parametrize("waiting", [2, 20, 60])
async def test_slow_previews_take_no_thread_that_others_need(
    client: TestClient[Any, Any], held_previews: threading.Event, waiting: int
) -> None:
    asked = [asyncio.create_task(client.get(f"/api/v1/preview/picture.png?width={32 + n}")) for n in range(waiting)]
    await asyncio.sleep(0)
    for _ in range(3):
        assert (await client.get("/api/v1/download/picture.png")).status == 200
        assert (await client.post("/api/v1/generate?dry_run=1", json={"prompt": "a"})).status == 200
        assert (await client.get("/api/v1/models?installed=true")).status == 200
    assert not any(task.done() for task in asked)
    held_previews.set()
    assert {(await task).status for task in asked} == {200}


@pytest.mark.parametrize("many", [1, 10, 60])
async def test_a_client_with_many_previews_keeps_no_other_waiting(
    client: TestClient[Any, Any], held_previews: threading.Event, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    held, begun = media.thumbnail, list[int]()

    def noted(file: BufferedReader, width: int) -> bytes:
        begun.append(width)
        return held(file, width)

    def ask(source: str, width: int) -> asyncio.Task[ClientResponse]:
        url = f"/api/v1/preview/picture.png?width={width}"
        return asyncio.create_task(client.get(url, headers={"X-Forwarded-For": source}))

    monkeypatch.setattr(media, "thumbnail", noted)
    asked = [ask("10.0.0.1", 32 + n) for n in range(many)]
    await until(lambda: len(begun) > 0)
    asked.append(ask("10.0.0.2", 1000))
    await until(lambda: 1000 in begun)
    assert len(begun) == 2
    held_previews.set()
    assert {(await task).status for task in asked} == {200}


async def test_a_preview_that_takes_too_long_is_503(
    client: TestClient[Any, Any], held_previews: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PREVIEW_S", 0.2)
    answers = [await client.get(f"/api/v1/preview/picture.png?width={width}") for width in (32, 33, 34)]
    assert [answer.status for answer in answers] == [503] * 3
    assert "takes too long" in (await answers[2].json())["detail"]
    held_previews.set()


# ---------------------------------------------------------------------------------------------- what a task leaves held


class Held:
    """Stands for a tensor."""


class HoldingStudio(stand_ins.BrokenStudio):
    """A session whose jobs hold something and end in a fault; when memory is given back, it looks if that is gone."""

    freed: bool | None = None
    _last: "weakref.ref[Held]"

    def make(self, _task_id: int, job: Job, _model: Model, meter: Meter) -> Result:
        """Hold something, then raise what the prompt names."""
        held = Held()
        self._last = weakref.ref(held)
        meter.enter(Phase.DENOISING)
        raise HOLDING_FAULTS[job.prompt]()

    def give_back(self) -> None:
        """What `torch.cuda.empty_cache` could give to the card now."""
        gc.collect()
        type(self).freed = self._last() is None


HOLDING_FAULTS: dict[str, Callable[[], BaseException]] = {
    "cancelled": Cancelled,
    "memory": MemoryError,
    "fault": lambda: RuntimeError("a fault"),
    "sentence": lambda: EngineError("Nothing works today."),
}


def hold(task_id: int, job: Job, model: Model) -> Result:
    """The worker's own `generate` with such a session; for the prompt "look", what was seen."""
    if job.prompt == "look":
        return Result((), {"freed": float(bool(HoldingStudio.freed))}, 0)
    worker._session = HoldingStudio()  # type: ignore[assignment]
    return stand_ins.REAL_GENERATE(task_id, job, model)


@pytest.fixture
async def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    monkeypatch.setattr(worker, "generate", hold)
    engine = Engine(stand_ins.config(tmp_path))
    yield engine
    engine.close()


@pytest.mark.parametrize("fault", HOLDING_FAULTS)
async def test_what_an_ended_task_held_is_free_when_memory_is_given_back(holding: Engine, fault: str) -> None:
    with pytest.raises((EngineError, Cancelled)):
        await holding.run(1, job(fault), DEMO)
    assert (await holding.run(2, job("look"), DEMO)).timings == {"freed": 1.0}


# ----------------------------------------------------------------------------------------------------- out of memory


@dataclass
class Decoder:
    """Watches every decoding of a video; the first `failures` run out of memory."""

    failures: int
    tiled: list[bool]  # whether the VAE worked on tiles, of each decoding


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    import torch

    from engine.gpu.run import decoding

    torch.set_num_threads(1)
    watching, pieces = Decoder(1, []), decoding.pieces

    def watched(pipe: Any, *arguments: Any) -> Any:
        watching.tiled.append(pipe.vae.use_tiling)
        if len(watching.tiled) <= watching.failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pieces(pipe, *arguments)

    monkeypatch.setattr(decoding, "pieces", watched)
    return watching


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Result]:
    """Runs a small job in the engine's own session on the CPU, in this process."""
    from engine.gpu.session import ModelSession
    from engine.job import Board

    (tmp_path / "state").mkdir()
    written = threading.Event()
    session = ModelSession(stand_ins.config(tmp_path), lambda _: written.set(), lambda *_: None)

    def made(task_id: int) -> Result:
        written.clear()
        result = session.make(task_id, job("a red circle", steps=1, frames=5), DEMO, Meter(Board(), task_id))
        assert written.wait(60)
        return result

    return made


def test_a_decode_that_runs_out_of_memory_is_tried_again_in_tiles(
    decoder: Decoder, make: Callable[[int], Result], tmp_path: Path
) -> None:
    (file,) = make(1).files
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.filename]
    make(2)
    assert decoder.tiled == [False, True, False]


def test_a_decode_that_fails_again_ends_in_a_sentence_and_the_next_task_runs(
    decoder: Decoder, make: Callable[[int], Result], tmp_path: Path
) -> None:
    decoder.failures = 2
    with pytest.raises(EngineError, match=r"^Out of memory while .*: try \d+x\d+, or video_length \d+\.$") as failed:
        make(1)
    assert failed.value.code == "out_of_memory"
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    assert len(make(2).files) == 1
    assert decoder.tiled == [False, True, False]
