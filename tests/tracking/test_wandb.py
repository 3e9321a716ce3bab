"""W&B has what was logged, and neither its service nor its server stops a run or holds it up."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from PIL import Image

from detr_fabric.config import Config, OptimConfig, TrainConfig, WandbConfig
from detr_fabric.draw import Boxes, Picture
from detr_fabric.errors import UserError
from detr_fabric.tracking import wandb as wandb_logger
from detr_fabric.tracking.wandb import WandbLogger, git_commit
from tests.offline_wandb import OfflineRun, read_runs

pytestmark = pytest.mark.process
CANARY = "canary" * 7
PICTURE = Picture(
    torch.zeros(3, 40, 60, dtype=torch.uint8),
    "image 7",
    predicted=Boxes(torch.tensor([[1.0, 2, 30, 20]]), torch.tensor([1]), torch.tensor([0.75])),
    ground_truth=Boxes(torch.tensor([[0.0, 2, 31, 20]]), torch.tensor([0])),
)


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


def finished_runs(home: Path) -> list[OfflineRun]:
    """What is on disk when the process has ended: W&B's service writes on for a moment after a run's end."""
    wandb.teardown()
    return read_runs(home / "run")


def start(home: Path, said: list[str], run_id: str | None = None, seed: int = 42, **settings: Any) -> WandbLogger:
    """settings: fields of WandbConfig."""
    config = Config(optim=OptimConfig(lr=3e-4), train=TrainConfig(name="r18", seed=seed), wandb=WandbConfig(**settings))
    facts = {"git_commit": "0123456789" * 4 + "-dirty", "parameters": {"backbone": 11, "transformer": 17}}
    return WandbLogger(config, home / "run", run_id, facts, said.append)


def test_an_offline_run_holds_everything_that_was_logged(home: Path) -> None:
    said: list[str] = []
    began = time.monotonic()
    logger = start(home, said, project="shapes", group="seeds", tags=("a", "b"))
    logger.log_metrics({"train/loss": 3.0, "lr/transformer": 1e-4, "epoch": 0.1}, step=10)
    assert time.monotonic() - began < 60
    assert len(said) == 2 and "No API key" in said[0] and "wandb sync" in said[1]
    logger.log_metrics({"train/loss": 2.0}, step=20)
    logger.log_pictures("val/panel", [PICTURE, PICTURE], ["cat", "dog"], step=20)
    logger.log_table("val/AP_table", ["class", "AP"], [["dog", 0.5], ["cat", 0.25]], step=20)
    logger.finalize("success")

    (run,) = finished_runs(home)
    assert run.id == logger.run_id
    assert (run.project, run.name, run.group, run.tags) == ("shapes", "r18", "seeds", ["a", "b"])
    assert run.config["optim"]["lr"] == 3e-4 and run.config["model"]["backbone"] == "resnet50"
    assert run.config["parameters"] == {"backbone": 11, "transformer": 17}
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
    time.sleep(1)  # W&B names the folders of a run's starts by the second
    second = start(home, [], mode="offline", run_id=first.run_id)
    second.log_metrics({"train/loss": 2.0}, step=20)
    second.finalize("success")
    runs = sorted(finished_runs(home), key=lambda run: min(run.values("train/loss")))
    assert [run.id for run in runs] == [first.run_id, first.run_id]
    assert [run.values("train/loss") for run in runs] == [{10: 3.0}, {20: 2.0}]
    assert [run.preempting for run in runs] == [True, False]
    assert [run.exit_code for run in runs] == [1, 0]


def test_a_disabled_run_writes_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    loggers = [start(home, said, mode="disabled")]
    monkeypatch.setenv("WANDB_DISABLED", "true")
    loggers.append(start(home, said))
    monkeypatch.delenv("WANDB_DISABLED")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers.append(start(home, said))
    for logger in loggers:
        logger.log_metrics({"train/loss": 1.0}, step=1)
        logger.log_pictures("val/panel", [PICTURE], ["cat", "dog"], step=1)
        logger.finalize("success")
    assert list((home / "run").iterdir()) == [] and said == []


def test_wandbs_own_variables_count_where_no_flag_is_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "elsewhere").mkdir()
    variables = {"PROJECT": "theirs", "NAME": "named", "TAGS": "t1,t2", "RUN_ID": "myid123", "RUN_GROUP": "lab"}
    for name, value in {**variables, "DIR": str(home / "elsewhere"), "MODE": "offline"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    said: list[str] = []
    logger = start(home, said)
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    wandb.teardown()
    (run,) = read_runs(home / "elsewhere")
    assert (run.project, run.name, run.tags, run.group) == ("theirs", "named", ["t1", "t2"], "lab")
    assert run.id == logger.run_id == "myid123" and len(said) == 1
    monkeypatch.delenv("WANDB_DIR")
    logger = start(home, said, run_id="stored", project="mine", name="flag", tags=("x",), group="own")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.finalize("success")
    (run,) = finished_runs(home)
    assert (run.project, run.name, run.tags, run.group, run.id) == ("mine", "flag", ["x"], "own", "stored")
    monkeypatch.setenv("WANDB_RUN_ID", "../x")
    with pytest.raises(UserError, match="WANDB_RUN_ID '../x'"):
        start(home, said)


def test_names_tell_seeds_apart(home: Path) -> None:
    def name(run: str, seed: int) -> str:
        return wandb_logger._default_name(Config(train=TrainConfig(name=run, seed=seed)))

    assert [name("r18", seed) for seed in (42, 1, 2)] == ["r18", "r18-seed1", "r18-seed2"]
    assert name("cell-seed3", 3) == "cell-seed3"


class Stuck:
    """A W&B run whose service hangs: every call waits until the test lets go."""

    disabled, offline, url = False, False, "nowhere"

    def __init__(self) -> None:
        self.let_go, self.logged = threading.Event(), list[int]()

    def log(self, values: dict[str, Any]) -> None:
        self.let_go.wait()
        self.logged.append(values["step"])

    def finish(self, exit_code: int) -> None:
        self.let_go.wait()


def test_a_service_that_hangs_holds_up_nobody_and_costs_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_logger, "CAPACITY", 8)
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT", 0.1)
    monkeypatch.setattr(wandb_logger, "GRACE", 0.1)
    run, said = Stuck(), list[str]()
    monkeypatch.setattr(WandbLogger, "_init", lambda self, mode: run)
    logger = start(home, said)
    began = time.monotonic()
    for step in range(100):
        logger.log_metrics({"a": 1.0}, step)
    assert said == ["W&B: nowhere", "W&B: it does not answer; training goes on, log.jsonl has what W&B misses"]
    logger.finalize("success")
    assert time.monotonic() - began < 5 and len(said) == 2
    run.let_go.set()


def test_a_start_that_hangs_is_given_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT", 0.1)
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT", 0.1)
    monkeypatch.setattr(wandb_logger, "GRACE", 0.1)
    let_go, said = threading.Event(), list[str]()
    monkeypatch.setattr(WandbLogger, "_init", lambda self, mode: let_go.wait() and Stuck())
    logger = start(home, said)
    logger.log_metrics({"a": 1.0}, 1)
    logger.finalize("success")
    assert said == ["W&B: it does not start; training goes on, log.jsonl has what W&B misses"]
    let_go.set()


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
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT", 2.0)
    said: list[str] = []
    logger = start(home, said, project="shapes")
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
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT", 2.0)
    monkeypatch.setattr(wandb_logger, "GRACE", 60.0)  # W&B's service is started twice
    said: list[str] = []
    logger = start(home, said, mode="online")
    logger.log_metrics({"train/loss": 3.0}, step=1)
    logger.finalize("success")
    assert len(said) == 2 and "Trying offline" in said[0] and "wandb sync" in said[1]
    (run,) = finished_runs(home)
    assert run.values("train/loss") == {1: 3.0} and run.id == logger.run_id
    assert not any(CANARY.encode() in path.read_bytes() for path in (home / "run").rglob("*") if path.is_file())
