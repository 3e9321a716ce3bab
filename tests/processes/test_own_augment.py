"""Whole runs with an augmentation of one's own: resumed bit for bit, and only with the same file."""

from __future__ import annotations

from pathlib import Path

from tests.commands import REPOSITORY, debug_job, records
from tests.same_runs import assert_same_run

EXAMPLE = (REPOSITORY / "experiments" / "augment_example.py").read_text()


def test_a_run_resumes_bit_for_bit_and_another_content_of_the_file_is_refused(folder: Path) -> None:
    file = folder / "mine.py"
    file.write_text(EXAMPLE)
    args = ("--data.augment", "mine.py", "--train.max-steps")
    whole = debug_job(folder, "mine-whole", *args, "6", "--data.workers", "2")
    assert whole.wait() == [0], whole.text()
    assert "--data.augment mine.py takes the place of the original's flip and crop" in whole.text()
    assert debug_job(folder, "mine-cut", *args, "3").wait() == [0]
    file.write_text(EXAMPLE.replace("p=0.5", "p=0.4"))
    refused = debug_job(folder, "mine-cut", *args, "6")
    assert refused.wait() == [2] and "mine.py has another content" in refused.text(), refused.text()
    file.write_text(EXAMPLE)
    assert debug_job(folder, "mine-cut", *args, "6", "--data.workers", "2").wait() == [0]
    assert_same_run(folder / "mine-cut", folder / "mine-whole")
    first = [[r["train/loss"] for r in records(folder / run) if "grad_norm" in r][0] for run in ("mine-whole", "whole")]
    assert first[0] != first[1]

    file.write_text("def augment(image, target): return image\n")
    broken = debug_job(folder, "mine-broken", *args, "6", "--data.workers", "2")
    assert broken.wait() == [2]
    (sentence,) = [line for line in broken.text().splitlines() if line.startswith("error: ")]
    assert "--data.augment mine.py: augment on image" in sentence and "Traceback" not in broken.text()
