"""The log of a resumed run is the log of a whole run."""

import csv

from zoo.cli.csv_logger import ResumableCSVLogger


def write(folder, rows, resume_step=None) -> list[dict]:
    logger = ResumableCSVLogger(folder, resume_step)
    for step, row in rows:
        logger.log_metrics(row, step)
    logger.finalize("ok")
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_rows_from_the_resumed_step_on_are_written_again(tmp_path):
    whole = write(tmp_path / "whole", [(s, {"loss": s / 7}) for s in range(6)])
    write(tmp_path / "cut", [(s, {"loss": s / 7}) for s in range(5)])
    assert write(tmp_path / "cut", [(s, {"loss": s / 7}) for s in range(3, 6)], resume_step=3) == whole


def test_a_validation_that_is_run_again_is_listed_once(tmp_path):
    rows = [(2, {"loss": 0.5}), (2, {"val_loss": 0.25})]
    assert write(tmp_path, rows) == write(tmp_path, rows[1:], resume_step=3)


def test_new_columns_keep_old_rows(tmp_path):
    write(tmp_path, [(0, {"loss": 1.0})])
    rows = write(tmp_path, [(1, {"val_loss": 2.0})])
    assert [(row["loss"], row["val_loss"]) for row in rows] == [("1.0", ""), ("", "2.0")]


def test_each_row_is_on_disk_at_once(tmp_path):
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert "1.0" in (tmp_path / "metrics.csv").read_text()
