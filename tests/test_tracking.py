"""A run's numbers reach log.jsonl, W&B and the console, and none of the three ever stops a run."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import wandb
from lightning_fabric.utilities.rank_zero import rank_zero_only
from offline_wandb import OfflineRun, read_runs
from PIL import Image

from detr_fabric import pictures, tracking
from detr_fabric.pictures import Boxes, Picture, class_color, draw, grid
from detr_fabric.progress import Progress
from detr_fabric.tracking import RunLog, WandbLogger, WandbMode, git_commit

CANARY = "canary" * 7
CONFIG = {"optim": {"lr": 1e-4}, "model": {"backbone": "resnet18"}}
PICTURE = Picture(
    torch.zeros(3, 40, 60, dtype=torch.uint8),
    "image 7",
    predicted=Boxes(torch.tensor([[1.0, 2, 30, 20]]), torch.tensor([1]), torch.tensor([0.75])),
    true=Boxes(torch.tensor([[0.0, 2, 31, 20]]), torch.tensor([0])),
)


# ---- log.jsonl


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_in_the_log_at_once_and_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", 0, print)
    log.write({"train/loss": 3.5, "grad_norm": float("inf")}, step=10, epoch=0.5)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 10, "epoch": 0.5, "train/loss": 3.5, "grad_norm": None}]


def test_a_resumed_log_has_every_step_once_and_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path, 0, print)
    for step in (10, 20, 30, 40):
        log.write({"train/loss": 1.0}, step, epoch=0.0)
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 20, "tra')  # killed while writing
    log = RunLog(path, 20, print)
    log.write({"train/loss": 2.0}, 30, epoch=0.0)
    assert [(record["step"], record["train/loss"]) for record in read_log(path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_costs_records_but_neither_the_run_nor_the_others(tmp_path: Path) -> None:
    path, said = tmp_path / "log.jsonl", list[str]()
    log = RunLog(path, 0, said.append)
    log.write({"train/loss": 1.0}, 1, epoch=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (path.stat().st_size + 7, limits[1])
    )  # the next record is torn by the limit
    try:
        log.write({"train/loss": 1.0}, 2, epoch=0.0)
        log.write({"train/loss": 1.0}, 3, epoch=0.0)
        log.write({"train/loss": 1.0}, 4, epoch=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write({"train/loss": 1.0}, 5, epoch=0.0)
    log.close()
    assert len(said) == 1 and "File too large" in said[0]
    RunLog(path, 9, print).close()
    assert [record["step"] for record in read_log(path)] == [1, 5]


# ---- git


def test_the_commit_of_a_checkout_is_found_and_marked_when_changed(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("1")
    assert git_commit(package) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *command], env=clean, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_commit(package) is None  # inside a checkout, but not part of it
    git("add", ".")
    git("commit", "-q", "--no-verify", "-m", "one")
    assert git_commit(package) == git("rev-parse", "HEAD")
    (package / "code.py").write_text("2")
    assert git_commit(package) == git("rev-parse", "HEAD") + "-dirty"


# ---- W&B


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine where W&B was never configured; `home / "run"` is the run folder."""
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    yield tmp_path
    wandb.teardown()  # or the next test inherits the environment of this one


def finished_runs(home: Path) -> list[OfflineRun]:
    """What is on disk when the process has ended: W&B's service writes on for a moment after a run's end."""
    wandb.teardown()
    return read_runs(home / "run")


def start(
    home: Path, said: list[str], mode: WandbMode | None = None, run_id: str | None = None, group: str | None = None
) -> WandbLogger:
    return WandbLogger(
        home / "run",
        CONFIG,
        mode=mode,
        project="shapes",
        entity=None,
        name="r18",
        group=group,
        tags=("a", "b"),
        run_id=run_id,
        commit="0123456789" * 4 + "-dirty",
        parameters={"backbone": 11, "transformer": 17},
        say=said.append,
    )


def test_an_offline_run_holds_everything_that_was_logged(home: Path) -> None:
    said: list[str] = []
    began = time.monotonic()
    logger = start(home, said, group="seeds")
    logger.log_metrics({"train/loss": 3.0, "lr/transformer": 1e-4, "epoch": 0.1}, step=10)
    assert time.monotonic() - began < 60
    assert len(said) == 2 and "No API key" in said[0] and "wandb sync" in said[1]
    logger.log_metrics({"train/loss": 2.0}, step=20)
    logger.log_hyperparams({"hosts": 2})
    logger.log_pictures("val/panel", [PICTURE, PICTURE], ["cat", "dog"], step=20)
    logger.log_table("val/AP_table", ["class", "AP"], [["dog", 0.5], ["cat", 0.25]], step=20)
    logger.finalize("success")

    (run,) = finished_runs(home)
    assert run.id == logger.run_id == logger.version
    assert (run.project, run.name, run.group, run.tags) == ("shapes", "r18", "seeds", ["a", "b"])
    assert run.config["optim"] == {"lr": 1e-4} and run.config["model"] == {"backbone": "resnet18"}
    assert run.config["parameters"] == {"backbone": 11, "transformer": 17} and run.config["hosts"] == 2
    assert run.config["git_commit"] == "0123456789" * 4 + "-dirty" and run.commit == "0123456789" * 4
    assert run.step_metrics["*"] == "step"
    assert run.values("train/loss") == {10: 3.0, 20: 2.0}
    assert run.values("lr/transformer") == {10: 1e-4}
    assert run.exit_code == 0
    table = json.loads(run.file(run.values("val/AP_table")[20]).read_text())
    assert table["columns"] == ["class", "AP"] and table["data"] == [["dog", 0.5], ["cat", 0.25]]

    panel = run.values("val/panel")[20]
    assert panel["captions"] == ["image 7", "image 7"]
    assert Image.open(run.folder / "files" / panel["filenames"][0]).size == (60, 40)
    predicted, true = (panel["all_boxes"][0][side] for side in ("predictions", "ground_truth"))
    (box,) = json.loads(run.file(predicted).read_text())["box_data"]
    assert box["position"] == {"minX": 1, "minY": 2, "maxX": 30, "maxY": 20} and box["domain"] == "pixel"
    assert box["box_caption"] == "dog 0.75" and box["scores"] == {"score": 0.75}
    (box,) = json.loads(run.file(true).read_text())["box_data"]
    assert box["position"]["maxX"] == 31 and box["box_caption"] == "cat"


def test_a_resumed_run_keeps_its_id_and_a_stopped_one_is_marked(home: Path) -> None:
    first = start(home, [], mode="offline")
    first.log_metrics({"train/loss": 3.0}, step=10)
    first.mark_preempting()
    first.finalize("preempted")
    second = start(home, [], mode="offline", run_id=first.run_id)
    second.log_metrics({"train/loss": 2.0}, step=20)
    second.finalize("success")
    runs = sorted(finished_runs(home), key=lambda run: min(run.values("train/loss")))
    assert [run.id for run in runs] == [first.run_id, first.run_id]
    assert [run.values("train/loss") for run in runs] == [{10: 3.0}, {20: 2.0}]
    assert [run.preempting for run in runs] == [True, False]
    assert [run.exit_code for run in runs] == [1, 0]


def test_other_ranks_and_disabled_runs_write_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    disabled = start(home, said, mode="disabled")
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    for logger in (disabled, start(home, said, mode="offline")):
        logger.log_metrics({"train/loss": 1.0}, step=1)
        logger.log_pictures("val/panel", [PICTURE], ["cat", "dog"], step=1)
        logger.finalize("success")
    assert list((home / "run").iterdir()) == [] and said == []


class StubServer(BaseHTTPRequestHandler):
    """Just enough of W&B's server for a run to start online; then it answers 500 to everything."""

    down = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        project = {"id": "p", "name": "shapes", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "x", "displayName": "x", "config": "{}", "historyLineCount": 0, "project": project}
        viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        answer = {
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "viewer": viewer,
            "model": None,
            "project": None,
        }
        body = b"" if self.down else json.dumps({"data": answer}).encode()
        self.send_response(500 if self.down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_goes_down_neither_stops_nor_holds_up_a_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Server", (StubServer,), {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 2.0)
    said: list[str] = []
    logger = start(home, said)
    logger.log_metrics({"train/loss": 3.0}, step=1)
    assert len(said) == 1 and "/me/shapes/runs/" in said[0]  # online
    server.RequestHandlerClass.down = True  # type: ignore[attr-defined]
    began = time.monotonic()
    for step in range(2, 100):
        logger.log_metrics({"train/loss": 3.0}, step)
    assert time.monotonic() - began < 20
    logger.finalize("success")
    assert time.monotonic() - began < 60
    server.shutdown()
    files = [path for path in (home / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not any(CANARY.encode() in path.read_bytes() for path in files)
    assert CANARY not in "".join([*said, *capfd.readouterr()])


def test_a_server_that_is_not_there_makes_the_run_offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 2.0)
    said: list[str] = []
    logger = start(home, said, mode="online")
    logger.log_metrics({"train/loss": 3.0}, step=1)
    logger.finalize("success")
    assert len(said) == 2 and "Trying offline" in said[0] and "wandb sync" in said[1]
    (run,) = finished_runs(home)
    assert run.values("train/loss") == {1: 3.0} and run.id == logger.run_id
    assert not any(CANARY.encode() in path.read_bytes() for path in (home / "run").rglob("*") if path.is_file())


# Processes of their own, forked from one that has imported torch once.

NURSERY = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from detr_fabric.progress import Progress
from detr_fabric.tracking import WandbLogger

def start(mode):
    return WandbLogger(Path("run"), {}, mode=mode, project="p", entity=None, name=None, group=None, tags=(),
                       run_id=None, commit=None, parameters={}, say=lambda text: print(text, flush=True))

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(250)
        os.chdir(job["folder"])
        os.environ.clear()
        os.environ.update(job["environment"])
        for number, path in enumerate(job["streams"]):
            os.dup2(os.open(path, os.O_RDWR if number == 0 else os.O_WRONLY | os.O_CREAT), number)
        exec(job["code"])
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    path = os.pathsep.join([str(Path(tracking.__file__).parents[1]), *sys.path])
    command, environment = [sys.executable, "-c", NURSERY], {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run_process(nursery: subprocess.Popen[str], home: Path, code: str, streams: dict[int, str] | None = None) -> Done:
    """Runs code in a new process in `home`; its standard streams are /dev/null and files unless named."""
    paths = {0: os.devnull, 1: str(home / "stdout"), 2: str(home / "stderr")} | (streams or {})
    job = {
        "folder": str(home),
        "environment": dict(os.environ),
        "streams": [paths[n] for n in range(3)],
        "code": code,
    }
    assert nursery.stdin is not None and nursery.stdout is not None
    nursery.stdin.write(json.dumps(job) + "\n")
    exit_code = int(nursery.stdout.readline())
    out, err = (path.read_text() if (path := home / name).is_file() else "" for name in ("stdout", "stderr"))
    return Done(exit_code, out, err)


def test_a_disabled_run_does_not_import_wandb(nursery: subprocess.Popen[str], home: Path) -> None:
    code = "logger = start('disabled'); logger.log_metrics({'a': 1.0}, 1); logger.finalize('success')"
    assert run_process(nursery, home, f"{code}; print('wandb' in sys.modules)") == Done(0, "False\n", "")


def test_without_a_key_nobody_at_a_terminal_is_asked(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "began = time.monotonic(); start(None).log_metrics({'a': 1.0}, 1)\n"
        "print(time.monotonic() - began < 60, sys.stdin.isatty(), sys.stderr.isatty())"
    )
    master, terminal = pty.openpty()
    streams = {0: os.ttyname(terminal), 2: os.ttyname(terminal)}  # W&B asks where both are terminals
    done = run_process(nursery, home, code, streams)
    os.close(terminal)
    os.close(master)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "True True True"
    assert [run.values("a") for run in read_runs(home / "run")] == [{1: 1}]


def test_a_kill_loses_at_most_the_last_second_of_an_offline_run(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "logger = start('offline'); logger.log_metrics({'a': 1.0}, 1); logger.log_metrics({'a': 2.0}, 2)\n"
        "time.sleep(1.5); logger.log_metrics({'a': 3.0}, 3); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run_process(nursery, home, code).exit_code == -signal.SIGKILL
    (run,) = read_runs(home / "run")
    assert {1: 1, 2: 2}.items() <= run.values("a").items()


def test_a_dead_wandb_service_costs_one_line(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "started = []\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); started.append(self)\n"
        "subprocess.Popen = Popen\n"
        "logger = start('offline'); logger.log_metrics({'a': 1.0}, 1)\n"
        "[service] = [process for process in started if 'wandb-core' in str(process.args)]\n"
        "service.kill(); service.wait()\n"
        "for step in (2, 3): logger.log_metrics({'a': 1.0}, step)\n"
        "logger.finalize('success'); print('trained to the end')"
    )
    done = run_process(nursery, home, code)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "training goes on" in lines[1] and lines[2] == "trained to the end", done.stderr
    assert done.exit_code == 0


def test_a_run_ends_well_when_its_standard_output_is_a_broken_pipe(nursery: subprocess.Popen[str], home: Path) -> None:
    code = (
        "with Progress(1, 500) as progress:\n"
        "    for step in range(1, 501): progress.update(0, step, {'train/loss': 1.0}); progress.say('x' * 1000)\n"
        "    print('others print too', flush=True)\n"
        "Path('reached').touch()"
    )
    os.mkfifo(home / "pipe")

    def read_a_line() -> None:
        with (home / "pipe").open() as reader:
            reader.readline()

    reader = threading.Thread(target=read_a_line)
    reader.start()
    done = run_process(nursery, home, code, {1: str(home / "pipe")})
    reader.join()
    assert done == Done(0, "", "")
    assert (home / "reached").exists()


# ---- console


RECORD = {"train/loss": 3.25, "lr/transformer": 1e-4, "lr/backbone": 1e-5, "images_per_second": 12.0, "data_wait": 0.04}


def test_without_a_terminal_there_is_one_plain_line_a_record() -> None:
    stream = io.StringIO()
    with Progress(epochs=3, total_steps=90, stream=stream) as progress:
        for step in range(1, 21):
            progress.update(0, step, RECORD if step % 10 == 0 else None)
        progress.say("saved [bold]")
    first, second, third = stream.getvalue().splitlines()
    assert first.startswith("epoch 1/3 step 10/90 loss 3.250 lr 1.0e-04 12.0 images/s data 4% ETA 0:00:0")
    assert second.startswith("epoch 1/3 step 20/90")
    assert third == "saved [bold]"


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress(epochs=1, total_steps=10, enabled=False, stream=stream) as progress:
        progress.update(0, 10, RECORD)
        progress.say("hello")
    assert stream.getvalue() == ""


def test_a_terminal_shows_a_bar_and_texts_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, Progress(epochs=3, total_steps=90, stream=stream) as progress:
        progress.update(1, 31, RECORD)
        progress.say("saved [bold]")
        progress.update(1, 32)
        shown = ""
        while select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 10_000).decode()
    os.close(master)
    assert "epoch 2/3" in shown and "31/90 loss 3.250" in shown and "32/90 loss 3.250" in shown
    assert "saved [bold]\r\n" in shown


def test_training_goes_on_when_the_terminal_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    master, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, Progress(epochs=1, total_steps=10, stream=stream) as progress:
        progress.update(0, 1, RECORD)
        os.close(master)
        for step in range(2, 11):
            progress.update(0, step, RECORD)
            progress.say("still here")


def test_an_ascii_terminal_gets_question_marks_instead_of_silence() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = Progress(epochs=1, total_steps=1, stream=stream)
    progress.say("naïve")
    progress.say("plain")
    assert raw.getvalue() == b"na?ve\nplain\n"


# ---- pictures


def test_a_small_image_is_enlarged_and_its_boxes_with_it() -> None:
    black = torch.zeros(3, 64, 64, dtype=torch.uint8)
    predicted = Boxes(torch.tensor([[10.0, 20, 40, 50]]), torch.tensor([1]), torch.tensor([0.9]))
    canvas = draw(Picture(black, "", predicted), ["a", "b"])
    assert canvas.size == (512, 512)
    assert canvas.getpixel((320, 300)) == class_color(1) == canvas.getpixel((200, 400))  # right and lower edge
    assert canvas.getpixel((200, 300)) == (0, 0, 0)
    assert draw(PICTURE._replace(image=torch.zeros(3, 480, 640, dtype=torch.uint8)), ["a", "b"]).size == (640, 480)


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (480, 640), (30, 900)])
def test_labels_stay_inside_the_picture(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = size
    spots: list[pictures.Rectangle] = []
    label = pictures._label

    def spy(*args: Any) -> pictures.Rectangle:
        spots.append(label(*args))
        return spots[-1]

    monkeypatch.setattr(pictures, "_label", spy)
    corners = [[0, 0, 5, 5], [width - 3, height - 3, width, height], [-50, -50, 2 * width, 2 * height], [9, 9, 9, 9]]
    boxes = Boxes(torch.tensor(corners).float(), torch.arange(4), torch.linspace(0, 1, 4))
    canvas = draw(
        Picture(torch.full((3, *size), 128, dtype=torch.uint8), "", boxes, boxes), ["cat", "dog", "person", "x"]
    )
    assert len(spots) == 4
    for left, top, right, bottom in spots:
        assert left >= 0 and top >= 0
        assert right <= max(canvas.width, right - left) and bottom <= max(canvas.height, bottom - top)


def test_true_boxes_are_dashed_and_neither_has_to_be_there() -> None:
    grey = torch.full((3, 512, 512), 128, dtype=torch.uint8)
    true = Boxes(torch.tensor([[100.0, 100, 400, 400]]), torch.tensor([0]))
    canvas = draw(Picture(grey, "", None, true), ["a"])
    edge = {canvas.getpixel((x, 100)) for x in range(120, 380)}
    assert edge == {(0, 0, 0), (255, 255, 255)}
    assert draw(Picture(grey, ""), ["a"]).getcolors() == [(512 * 512, (128, 128, 128))]


def test_class_colors_differ_between_neighbours() -> None:
    colors = [class_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    assert all(
        max(abs(a - b) for a, b in zip(x, y, strict=True)) > 80 for x, y in zip(colors, colors[1:], strict=False)
    )


def test_a_grid_holds_every_picture_above_its_caption() -> None:
    red, wide = Image.new("RGB", (64, 64), (255, 0, 0)), Image.new("RGB", (640, 320), (0, 0, 255))
    sheet = grid([red, wide, red], ["one", "two", "three"], columns=2, cell=128)
    counts = {color: count for count, color in sheet.getcolors(1 << 20) or []}
    assert counts[(255, 0, 0)] == 2 * 128 * 128 and counts[(0, 0, 255)] == 128 * 64
    assert sheet.width < 3 * 128
