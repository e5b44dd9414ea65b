"""The same masks on one machine or many: gloo processes on the CPU, in every layout.

- FSDP2 with uneven and empty shards, HSDP, tensor parallel, both together, DDP; FSDP1 with use_orig_params and torch's
  ZeroRedundancyOptimizer: masks, parameters and telemetry are those of one process that was given the same gradients.
- A planted double count of a replicated norm is refused, and past that makes the same comparison fail.
- Checkpoints go on bit for bit on other numbers of ranks and in other layouts.
- Collectives of a refresh: 5, of a size that knows the number of layers alone. Of other steps, and of DDP: none.
- A state of one process loads into shards without a word from torch.distributed.checkpoint.
- A rank without a gradient in a step counts the step, and takes part in its refresh.
- Masks and selections follow where DTensors replace whole parameters, and flat checkpoints bring them along.
- Ranks that differ raise, each of them, and say in what; also when one of them changes later.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def run(check: str, world: int, folder: Path) -> None:
    """Run a check of ranks.py on every rank; show what a rank that failed has printed."""
    script = Path(__file__).with_name("ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), check, str(rank), str(world), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    failed = [
        f"rank {rank}:\n{out}" for rank, (p, out) in enumerate(zip(processes, outputs, strict=True)) if p.returncode
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_masks_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run("masks_are_those_of_one_process", world, tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_other_optimizers_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run("other_optimizers_are_those_of_one_process", world, tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_scores_selection_and_sparse_steps_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run("piece_is_that_of_one_process", world, tmp_path)


def test_stages_of_a_pipeline_agree_by_the_names_of_layers(tmp_path: Path) -> None:
    run("stages_of_a_pipeline", 3, tmp_path)


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "isolated"])
def test_a_rank_without_a_gradient_takes_part_in_the_refresh(kind: str, tmp_path: Path) -> None:
    run(f"experts_whose_gradients_come_and_go:{kind}", 2, tmp_path)


@pytest.mark.parametrize("world", [2, 4])
def test_a_double_count_would_be_seen(world: int, tmp_path: Path) -> None:
    run("a_double_count_is_seen", world, tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_slices_of_fsdp1_and_the_parameters_of_zero(world: int, tmp_path: Path) -> None:
    run("fsdp1_and_zero", world, tmp_path)


def test_replicas_of_fsdp1_go_by_the_group_that_shards(tmp_path: Path) -> None:
    run("replicas_of_fsdp1", 4, tmp_path)


def test_a_rank_without_entries_keeps_the_clock(tmp_path: Path) -> None:
    run("a_rank_without_entries_keeps_the_clock", 3, tmp_path)


def test_a_part_of_the_ranks(tmp_path: Path) -> None:
    run("a_part_of_the_ranks", 3, tmp_path)


def test_gradients_that_are_partial_sums(tmp_path: Path) -> None:
    run("gradients_that_are_partial_sums", 2, tmp_path)


def test_checkpoints_between_layouts_go_on_bit_for_bit(tmp_path: Path) -> None:
    run("checkpoints_between_layouts", 4, tmp_path)


def test_a_state_is_broadcast_from_rank_0(tmp_path: Path) -> None:
    run("a_state_is_broadcast_from_rank_0", 2, tmp_path)


@pytest.mark.parametrize("kind", ["ema", "exp_avg_sq", "isolated", "sparse", "full"])
def test_checkpoints_go_from_4_ranks_to_2_to_1_to_3_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """In the middle of an interval, with uneven shards; "full" is one file of whole tensors."""
    for world in (4, 2, 1, 3):
        (tmp_path / "store").unlink(missing_ok=True)
        run(f"resharded:{kind}", world, tmp_path)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["sparse", "masked"])
def test_flat_checkpoints_of_fixed_masks_go_on_bit_for_bit(kind: str, world: int, tmp_path: Path) -> None:
    run(f"flat_checkpoints:{kind}", world, tmp_path)


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_a_parameter_frozen_at_a_load_keeps_its_selection(form: str, tmp_path: Path) -> None:
    run(f"a_frozen_parameter_keeps_its_selection:{form}", 2, tmp_path)


def test_masks_of_whole_parameters_follow_into_shards(tmp_path: Path) -> None:
    run("masks_follow_into_shards", 2, tmp_path)


def test_a_full_sparse_state_loads_into_one_process(tmp_path: Path) -> None:
    run("a_full_sparse_state_loads_into_one_process", 2, tmp_path)


def test_states_of_one_process_load_into_shards(tmp_path: Path) -> None:
    run("states_of_one_process_load_into_shards", 3, tmp_path)


def test_the_step_of_zeros_that_makes_a_state_changes_nothing(tmp_path: Path) -> None:
    run("a_step_of_zeros_changes_nothing", 2, tmp_path)


def test_a_parameter_that_thaws_joins_on_all_ranks(tmp_path: Path) -> None:
    run("a_parameter_that_thaws_joins_on_all_ranks", 2, tmp_path)


def test_collectives_are_few_and_their_size_knows_no_parameters(tmp_path: Path) -> None:
    run("collectives_are_few_and_small", 2, tmp_path)


def test_a_mismatch_raises_on_every_rank(tmp_path: Path) -> None:
    run("a_mismatch_raises_on_every_rank", 3, tmp_path)
