"""Spoilt files of a finished or an interrupted training: models, checkpoints, logs, token caches."""

import shutil
from pathlib import Path

import numpy as np
from damage import choice, files_in, spoil, spoil_json
from house import STAGES, Case, House, draw, measure, resume


def model_weights(house: House, folder: Path, rng: np.random.Generator) -> Case:
    run = house.copy_run(folder)
    stage = choice(rng, STAGES)
    path = choice(rng, files_in(run / stage / "model" / "weights"))
    what = f"{spoil(rng, path)} of the {stage}'s weights"
    if rng.random() < 0.25:
        return measure(house, run, what, True, (f"{stage}/model",))
    return draw(house, folder, run, what, True, (f"{stage}/model",))


def model_metadata(house: House, folder: Path, rng: np.random.Generator) -> Case:
    run = house.copy_run(folder)
    stage = choice(rng, STAGES)
    path = run / stage / "model" / "metadata.json"
    what = (spoil if rng.random() < 0.3 else spoil_json)(rng, path) + f" of the {stage}"
    if rng.random() < 0.2:
        return measure(house, run, what, False)
    if stage == "tokenizer" and rng.random() < 0.25:
        case = resume(house, folder, run, "generator", what)
        case.result = lambda: ""  # what the tokenizer says of itself may change what the generator learns
        case.may_change = ("run",)
        return case
    return draw(house, folder, run, what, False)


def training_checkpoint(house: House, folder: Path, rng: np.random.Generator) -> Case:
    run = house.copy_run(folder)
    stage = choice(rng, STAGES)
    checkpoints = run / stage / "checkpoints"
    newest = max((p for p in checkpoints.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    if rng.random() < 0.15:
        victim = choice(rng, [p for p in newest.rglob("*") if p.is_dir()])
        shutil.rmtree(victim)
        what = f"remove the folder {victim.relative_to(run)}"
    else:
        path = choice(rng, files_in(newest if rng.random() < 0.9 else checkpoints))
        what = f"{spoil(rng, path)} in {path.parent.relative_to(run)}"
    case = resume(house, folder, run, stage, what, (f"{stage}/checkpoints", "checkpoint"))
    case.moves = True
    return case


def workdir_file(house: House, folder: Path, rng: np.random.Generator) -> Case:
    run = house.copy_run(folder)
    stage = choice(rng, STAGES)
    logs = [
        p
        for p in run.rglob("*")
        if p.is_file() and p.suffix in (".jsonl", ".txt", ".v2", ".png") and "weights" not in p.parts
    ]
    own = [p for p in logs if "checkpoints" not in p.parts and stage in p.parts]
    path = run / "config.json" if rng.random() < 0.5 else choice(rng, sorted(own))
    what = (spoil_json if path.name == "config.json" and rng.random() < 0.7 else spoil)(
        rng, path
    ) + f" of {path.parent.name}"
    if rng.random() < 0.5:
        return measure(house, run, what, False)
    case = resume(house, folder, run, stage, what)
    case.may_change += ("run/evaluation",)
    return case


def token_cache(house: House, folder: Path, rng: np.random.Generator) -> Case:
    run = house.copy_run(folder)
    path = choice(rng, files_in(run / "token_cache"))
    way = spoil_json if path.suffix == ".json" and rng.random() < 0.6 else spoil
    what = f"{way(rng, path)} of the token cache"
    if rng.random() < 0.4:
        return measure(house, run, what, True, ("token cache", "token_cache"))
    return resume(house, folder, run, "generator", what, ("token cache", "token_cache"))
