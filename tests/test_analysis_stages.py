"""Stage detection, unused layers and experts, and the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from step_records import EXPERTS, LAYERS, dense_record, relu_record, relu_run, three_stages

from ds_remoe.analysis.layers import dead_layers, last_part, mean_expert_load, silent_experts
from ds_remoe.analysis.stages import Stages, detect_stages
from ds_remoe.analysis.stages_plot import plot_expert_load, plot_stages, smooth

TARGET = 0.875


def test_three_stages_are_found() -> None:
    assert detect_stages(relu_run(three_stages()), TARGET) == Stages(sparsifying_from=61, settled_at=100)


def test_passing_through_the_target_is_not_settling() -> None:
    overshoot = [0.1] * 5 + [0.874, 0.876, 0.95, 0.97, 0.9] + [0.87] * 10
    assert detect_stages(relu_run(overshoot), TARGET, window=5) == Stages(6, 11)
    assert detect_stages(relu_run(overshoot), TARGET, window=2) == Stages(6, 6)


def test_the_whole_window_must_be_recorded() -> None:
    run = relu_run([0.1] * 3 + [0.875] * 9)
    assert detect_stages(run, TARGET, window=9).settled_at == 4
    assert detect_stages(run, TARGET, window=10).settled_at is None


def test_tolerance_is_inclusive_and_two_sided() -> None:
    run = relu_run([0.25, 0.5, 0.625, 0.875, 0.75])
    assert detect_stages(run, 0.75, window=3, tolerance=0.125).settled_at == 3
    assert detect_stages(run, 0.75, window=3, tolerance=0.12).settled_at is None


def test_leaving_later_does_not_unsettle() -> None:
    run = relu_run([0.1, 0.9, 0.875, 0.875, 0.875, 0.3, 0.2])
    assert detect_stages(run, TARGET, window=3) == Stages(2, 3)


def test_runs_that_never_get_there() -> None:
    assert detect_stages(relu_run([0.1] * 30), TARGET) == Stages(None, None)
    assert detect_stages(relu_run([0.1] * 30 + [0.6] * 30), TARGET) == Stages(31, None)
    assert detect_stages([], TARGET) == Stages(None, None)
    assert detect_stages([dense_record(1)], TARGET) == Stages(None, None)


def test_run_without_a_dense_stage() -> None:
    assert detect_stages(relu_run([0.875] * 30), TARGET) == Stages(1, 1)
    assert detect_stages(relu_run([0.4] * 5 + [0.25] * 30), 0.25) == Stages(1, 6)


def test_stages_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="window: 0"):
        detect_stages([], TARGET, window=0)
    with pytest.raises(ValueError, match="tolerance: -1"):
        detect_stages([], TARGET, tolerance=-1)


@pytest.mark.parametrize(("count", "kept"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_last_quarter(count: int, kept: int) -> None:
    assert list(last_part(range(count))) == list(range(count - kept, count))


def loads(middle_layer: float, expert_5: float) -> tuple[tuple[float, ...], ...]:
    even = [0.125] * EXPERTS
    silent = [0.125] * 5 + [expert_5] + [0.125] * 2
    return tuple(tuple(row) for row in (even, [middle_layer / EXPERTS] * EXPERTS, silent))


def test_dead_layers_and_silent_experts_by_the_last_quarter_only() -> None:
    healthy, broken = loads(1.0, 0.125), loads(0.04, 0.01)
    run = [relu_record(step, expert_load=healthy if step <= 6 else broken) for step in range(1, 9)]
    assert dead_layers(run) == (1,)
    assert silent_experts(run) == (*((1, expert) for expert in range(EXPERTS)), (2, 5))
    assert dead_layers(run, last_fraction=1.0) == ()
    assert dead_layers(run[:6]) == ()
    assert silent_experts(run[:6]) == ()
    np.testing.assert_allclose(mean_expert_load(run, 1.0)[1], (6 * 1.0 + 2 * 0.04) / 8 / EXPERTS)


def test_dense_model_has_no_layers_to_judge() -> None:
    run = [dense_record(1), dense_record(2)]
    assert dead_layers(run) == ()
    assert silent_experts(run) == ()
    assert mean_expert_load(run).size == 0


def test_smoothing_is_centred_and_skips_what_is_not_finite() -> None:
    line = np.arange(9.0)
    np.testing.assert_allclose(smooth(line, 5), line)
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 0.0, 9.0, 0.0]), 3), [0, 1, 4, 3, 0])
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0]), 3), [1, 2, 3])


def coloured(path: Path, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.rint(imread(path)[..., :3] * 255).astype(int)
    return int((pixels == wanted).all(axis=-1).sum())


STAGE_SHADES = ("#E8EEF4", "#FBF0DC", "#E6F3EE")


def test_picture_shows_each_stage_in_its_width(tmp_path: Path) -> None:
    path = plot_stages(relu_run(three_stages()), TARGET, tmp_path / "pictures" / "stages.png", title="run")
    dense, sparsifying, stable = (coloured(path, shade) for shade in STAGE_SHADES)
    assert dense / sparsifying == pytest.approx(60 / 40, rel=0.2)
    assert stable / sparsifying == pytest.approx(200 / 40, rel=0.2)


def test_unsettled_picture_has_no_stable_stage(tmp_path: Path) -> None:
    path = plot_stages(relu_run([0.1] * 30 + [0.6] * 30), TARGET, tmp_path / "stages.png")
    assert coloured(path, STAGE_SHADES[1]) > 10_000
    assert coloured(path, STAGE_SHADES[2]) == 0


def test_panels_that_do_not_apply_are_left_out(tmp_path: Path) -> None:
    relu = plot_stages(relu_run([TARGET] * 40), TARGET, tmp_path / "relu.png")
    topk_run = [relu_record(step, l1_coefficient=None, l1_loss=None) for step in range(1, 41)]
    topk = plot_stages(topk_run, TARGET, tmp_path / "topk.png")
    dense = plot_stages([dense_record(step) for step in range(1, 41)], TARGET, tmp_path / "dense.png")
    heights = [imread(path).shape[0] for path in (relu, topk, dense)]
    assert heights[0] > heights[1] > heights[2]
    assert all(coloured(path, shade) == 0 for path in (topk, dense) for shade in STAGE_SHADES)


def test_pictures_of_odd_runs_are_drawn(tmp_path: Path) -> None:
    plot_stages([relu_record(1)], TARGET, tmp_path / "one.png")
    plot_stages(relu_run([0.1, 0.2], lm_loss=float("nan")), TARGET, tmp_path / "nan.png")
    plot_stages(relu_run([0.1] * 10 + [TARGET] * 200), TARGET, tmp_path / "log.png")
    for name in ("one", "nan", "log"):
        assert imread(tmp_path / f"{name}.png").std() > 0.01
    with pytest.raises(ValueError, match="records: empty"):
        plot_stages([], TARGET, tmp_path / "none.png")


def test_load_picture(tmp_path: Path) -> None:
    run = [relu_record(step, expert_load=loads(1.0, 0.01)) for step in range(1, 9)]
    path = plot_expert_load(run, tmp_path / "load.png")
    assert coloured(path, "#E69F00") > 20
    healthy = [relu_record(step, expert_load=loads(1.0, 0.125)) for step in range(1, 9)]
    assert coloured(plot_expert_load(healthy, tmp_path / "even.png"), "#E69F00") == 0
    assert len(run[0].expert_load) == LAYERS
    with pytest.raises(ValueError, match="no expert load"):
        plot_expert_load([dense_record(1)], tmp_path / "dense.png")
