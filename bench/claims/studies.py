"""Studies that are no comparison of systems: what importance is, where it lies and how it moves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from claims.system import Scores
from claims.tasks import prose
from claims.world import World, cut
from epi_kernels import EPIAdamW
from epi_kernels.importance import fisher, second_order
from epi_kernels.metrics import importance_validity, mask_jaccard, overlap_matrix, placement
from epi_kernels.select import top_k

RATIOS = (0.001, 0.01, 0.05)


def overlap_of_tasks(world: World) -> dict[str, Any]:
    """Score the pre-trained model for each task: overlaps of the tasks' top entries, and where these lie.

    EPI Table 13; PIECE Figures 3 and 5.
    """
    overlaps: dict[str, dict[str, float]] = {}
    places: dict[str, dict[str, float]] = {}
    kinds: dict[str, Callable[..., Scores]] = {"F": fisher, "S": second_order}
    for kind, score in kinds.items():
        scores = {
            task.name: score(world.fresh(), world.scoring(task), world.loss, progress=False) for task in world.order
        }
        for ratio in RATIOS:
            masks = {name: top_k(values, ratio) for name, values in scores.items()}
            matrix = overlap_matrix(masks)
            names = list(matrix)
            overlaps[f"{kind} {ratio}"] = {
                f"{a} {b}": round(matrix[a][b], 4) for i, a in enumerate(names) for b in names[:i]
            }
            for name, mask in masks.items():
                places[f"{kind} {ratio} {name}"] = shares(mask)
    return {"overlaps": overlaps, "places": places}


def shares(mask: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of a mask in each layer and in each kind of module."""
    found: dict[str, float] = {}
    for place in placement(mask):
        for key in (place.layer, f"kind {place.kind}"):
            found[key] = round(found.get(key, 0.0) + place.share_of_mask, 5)
    return found


def followed(world: World, model: nn.Module, purpose: str, *, move: bool) -> EPIAdamW:
    """Feed EPI with the first task's gradients, for as many steps as a task has; `move`: the weights follow."""
    budget = world.budget
    settings = {"importance_beta": budget.beta, "isolation_ratio": 0.01, "mask_interval": None, "layers": "block"}
    optimizer = EPIAdamW(model.named_parameters(), lr=3e-4 if move else 0.0, **settings)
    rows = world.batch(world.order[0], budget.steps * budget.rows, purpose)
    for batch in cut(rows, budget.rows):
        world.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.refresh()
    return optimizer


def noise_floor(world: World) -> dict[str, Any]:
    """Compare the masks of two importances that saw other rows of the same task at the same weights.

    EPI Table 11 says nothing without it: masks differ by the noise of the rows alone.
    """
    found = {}
    for ratio in (0.01, 0.1):
        masks = []
        for purpose in ("noise, first", "noise, second"):
            model = world.fresh()
            optimizer = followed(world, model, purpose, move=False)
            scores = {name: optimizer.importance(param) for name, param in model.named_parameters()}
            masks.append(top_k(scores, ratio, normalize="layer", layers="block"))
        found[str(ratio)] = round(mask_jaccard(*masks), 4)
    return {"overlaps": found}


def importance_and_perturbation(world: World) -> dict[str, Any]:
    """Compare EPI's importance with how much the loss changes when entries are perturbed, before and after learning.

    EPI Table 15: "early" is at the pre-trained weights and "late" after learning the first task; the loss is that of
    the first task early, and that of the prose of the pre-training as the old task late.
    """
    found = {}
    old = prose()
    for stage, move in (("early", False), ("late", True)):
        model = world.fresh()
        optimizer = followed(world, model, "perturbation", move=move)
        scores = {name: optimizer.importance(param) for name, param in model.named_parameters()}
        exact = copy.deepcopy(model).double()
        for name, task in (("task", world.order[0]), ("prose", old)):
            rows = world.batch(task, 2 * world.budget.rows, "perturbed")
            validity = importance_validity(
                exact, [rows], world.loss, scores, deviation=0.02, per_layer=24, layers="block"
            )
            found[f"{stage}, {name}"] = {"pearson": validity.pearson, "spearman": validity.spearman}
    return {"correlations": found}


STUDIES: dict[str, Callable[[World], dict[str, Any]]] = {
    "overlap of tasks": overlap_of_tasks,
    "noise floor": noise_floor,
    "importance and perturbation": importance_and_perturbation,
}
