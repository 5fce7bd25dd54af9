# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from typer.testing import CliRunner

from nemo_dsv4_cp.checks.operation_timing import OperationTime
from nemo_dsv4_cp.cli.app import app
from nemo_dsv4_cp.kernels.reference import TorchKernels

SMALL = ["--seq-len", "2048", "--cp-size", "2", "--ratio", "0"]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_bytes_compares_automodel_and_every_transport():
    done = run("bytes", *SMALL, "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    paths = {figure["case"]["path"]: figure for figure in figures}
    assert set(paths) == {"automodel", "all_gather", "boundary"}
    received = "forward_bytes_per_token_and_remote_rank"
    assert paths["automodel"][received] == 1024
    assert paths["boundary"][received] == pytest.approx(127 * 1024 / 1024)


def test_memory_names_the_largest_tensors_and_draws(tmp_path):
    plot, figures = tmp_path / "out.png", tmp_path / "figures.json"
    arguments = ["--seq-len", "512", *SMALL[2:], "--json", str(figures), "--plot", str(plot)]
    done = run("memory", *arguments)
    assert done.exit_code == 0, done.output
    assert "largest tensors" in done.output
    assert plot.stat().st_size > 10_000
    assert all(len(figure["largest"]) == 5 for figure in json.loads(figures.read_text()))


def peak_with(workspace_mib):
    done = run("memory", *SMALL, "--workspace-mib", str(workspace_mib), "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    return {figure["case"]["path"]: figure["peak_bytes"] for figure in figures}


@pytest.mark.slow  # tests/kernels/test_reference_attention.py holds the workspace
def test_memory_goes_by_the_workspace():
    small, large = peak_with(16), peak_with(128)
    assert small["automodel"] == large["automodel"]
    assert small["boundary"] < large["boundary"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "1000", "--cp-size", "3"], "use 1152"),
        (["--ratio", "8"], "none of V4's"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: there is no directory nowhere"),
        (["--plot", "."], "cannot be written"),
    ],
)
def test_a_mistake_ends_with_a_line_that_says_what_works(arguments, message):
    done = run("bytes", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert "Traceback" not in done.output


def test_launches_counts_what_kernels_register():
    done = run("launches", *SMALL, "--kernels", "triton", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    paths = {figure["case"]["path"]: figure for figure in figures}
    assert set(paths) == {"automodel", "all_gather", "boundary"}
    ours, theirs = paths["boundary"]["forward"], paths["automodel"]["forward"]
    assert 0 < ours["count"] < theirs["count"]
    assert 0 < ours["read_bytes"] + ours["written_bytes"] < theirs["read_bytes"]


def test_layers_of_v41_are_profiled_by_number():
    model = ["--model", "v41_flash", "--layer", "0", "--layer", "24"]
    done = run("memory", *SMALL[:4], *model, "--kernels", "triton", "--json", "-")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout[done.stdout.index("[") :])
    found = {(figure["case"]["layer"], figure["case"]["path"]): figure for figure in figures}
    assert [layer for layer, path in found if path == "boundary"] == [0, 24]
    assert {figure["case"]["ratio"] for figure in figures} == {0, 1}
    assert found[24, "boundary"]["carried_bytes"] > found[0, "boundary"]["carried_bytes"] == 0
    shown = run("launches", *SMALL[:4], *model[:4], "--kernels", "triton")
    assert "V4.1-Flash" in shown.output
    assert "layer" in shown.output


def test_kernels_prints_what_their_binaries_take(tmp_path):
    figures = tmp_path / "figures.json"
    done = run("kernels", "--model", "v4_flash", "--arch", "90", "--json", str(figures))
    assert done.exit_code == 0, done.output
    rows = json.loads(figures.read_text())
    names = ["kernel", "model", "arch", "registers", "stack", "shared", "limit", "tensor_core"]
    assert all(list(row) == [*names, "issued_over_needed", "modelled_ms"] for row in rows)
    found = {row["kernel"]: row for row in rows}
    assert found["keys_kernel"]["tensor_core"] == "wgmma"
    assert found["keys_kernel"]["issued_over_needed"] == 1
    assert (
        found["top_k_kernel"]["tensor_core"] is found["top_k_kernel"]["issued_over_needed"] is None
    )
    assert all(row["shared"] < row["limit"] == 227 << 10 and row["modelled_ms"] > 0 for row in rows)
    assert "norm_rotate_backward " in done.stdout
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = " ".join(done.output.split())
    assert "Modelled time of one layer's kernels" in shown


def test_work_is_counted_rank_by_rank_with_balance_and_without(tmp_path):
    figures = tmp_path / "figures.json"
    sizes = ["--seq-len", "65536", "--cp-size", "4", "--ratio", "4", "--json", str(figures)]
    for drawn in ([], ["--shortest", "1000", "--longest", "40000"]):
        done = run("work", *sizes, *drawn)
        assert done.exit_code == 0, done.output
        forward = {
            row["balance"]: row for row in json.loads(figures.read_text()) if "for" in row["pass"]
        }
        for row in forward.values():
            assert len(row["flops"]) == 4
            assert row["largest_over_mean"] == max(row["flops"]) * 4 / sum(row["flops"])
        assert sum(forward["on"]["flops"]) == pytest.approx(sum(forward["off"]["flops"]), rel=0.01)
        assert forward["on"]["largest_over_mean"] < 1.02 < forward["off"]["largest_over_mean"]


def test_work_of_v41_is_that_of_its_layers():
    drawn = ["--shortest", "1000", "--longest", "40000"]
    sizes = ["--seq-len", "65536", "--cp-size", "4", "--model", "v41_flash", "--json", "-"]
    done = run("work", *sizes, "--layer", "20", "--layer", "24", *drawn)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout[done.stdout.index("[") :])
    found = {
        (row["layer"], row["balance"]): row["flops"] for row in rows if row["pass"] == "forward"
    }
    assert sum(found[20, "on"]) == pytest.approx(sum(found[20, "off"]), rel=0.01)
    assert max(found[20, "on"]) * 4 < 1.03 * sum(found[20, "on"])
    assert max(found[20, "off"]) > 1.03 * max(found[20, "on"])
    assert found[24, "on"] == found[24, "off"]  # no query moves
    assert {row["ratio"] for row in rows} == {1}


def test_operations_of_v41_are_timed_by_layer(monkeypatch):
    monkeypatch.setattr("nemo_dsv4_cp.cli.bench.require_gpu", lambda *_: None)
    monkeypatch.setattr("nemo_dsv4_cp.kernels.triton.TritonKernels", TorchKernels)
    selections = []

    def timed(kernels, sizes, ratio, *shape, selects, **_):
        selections.append((sizes.index_n_heads, ratio, selects))
        return [OperationTime("attention forward", ratio, 0.004, 8 * 10**11)]

    monkeypatch.setattr("nemo_dsv4_cp.checks.operation_timing.time_operations", timed)
    done = run("operations", *SMALL[:4], "--model", "v41_flash", "--json", "-")
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout[done.stdout.index("{") :])["operations"]
    assert [each["layer"] for each in measured] == [0, 2, 3, 20, 24, 25]
    how = [None, "all entries", None, "candidates", "inside candidates", None]
    assert selections == list(zip([32] * 6, [0, 2, 2, 1, 1, 1], how, strict=True))


def test_what_balance_moves_is_in_the_bytes():
    figures = {}
    for balance in ("on", "off"):
        sizes = ["--seq-len", "4096", "--cp-size", "2", "--ratio", "128"]
        done = run("bytes", *sizes, "--balance", balance, "--json", "-")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout[done.stdout.index("[") :])
        figures[balance] = next(each for each in found if each["case"]["path"] == "boundary")
    moved = figures["on"]["received_forward"] - figures["off"]["received_forward"]
    assert 2048 // 2 * 11 << 10 < moved < 2048 // 2 * 12 << 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bytes", *SMALL, "--balance", "always"], "none of auto, on and off"),
        (["bytes", "--model", "v41"], "use v4_flash or v41_flash"),
        (["memory", *SMALL, "--model", "v41_flash"], "with --model v41_flash use --layer"),
        (["launches", "--layer", "2"], "--layer is for v41_flash"),
        (["launches", "--model", "v41_flash", "--layer", "41"], "use 0 to 39"),
        (["bytes", "--model", "v41_flash", "--seq-len", "9"], "use 16"),
        (["work", "--model", "v41_flash", "--seq-len", "9"], "use 16"),
        (["work", "--shortest", "9", "--longest", "8"], "is more than --longest 8"),
        (["overlap", "--delay", "0"], "slows nothing"),
        (["launches", *SMALL, "--kernels", "fastest"], "not installed"),
        (["kernels", "--arch", "70"], "none of 80, 90, 100, 103"),
        (["kernels", "--arch", "89"], "89 has 99 KiB of shared memory per block"),
        (["operations", *SMALL], "needs a GPU"),
        (["kernels", "--model", "v3"], "none of v4_flash, v4_pro"),
    ],
)
def test_options_that_cannot_be_are_named(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    ["bytes", "memory", "time", "launches", "kernels", "operations", "work", "overlap"],
)
def test_every_command_shows_an_example(command):
    assert f"nemo-dsv4-cp bench {command}" in run(command, "--help").output
