"""`modiff calibrate --method`: weight codes and activation scales of a model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

import modiff_kernels as mk
from modiff_kernels.calibration import METHODS
from modiff_kernels.evaluation import UserError, networks

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    folder = args.out or Path("calibration")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file of this name is there; give a folder")
    networks.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = _options(args.method, args.set)
    model = networks.load_model(args.model, args.prompt, networks.choose_device(args.device))
    networks.check_steps(model, args.scheduler, args.steps)
    unet = model.unet.to(memory_format=torch.channels_last)
    try:
        result = mk.calibrate(
            unet,
            args.method,
            _config(args),
            steps=args.steps,
            samples=args.samples,
            batch=args.batch,
            seed=args.seed,
            folder=folder,
            weights=args.weights,
            quiet=args.quiet,
            scheduler=networks.make_scheduler(model, args.scheduler),
            sample=lambda seeds: networks.sample_images(model, unet, args.scheduler, args.steps, seeds),
            **options,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; give another folder") from error
    if not args.quiet:
        seconds = result.metadata["seconds"]
        print(f"{len(result.layers)} layers of {model.name} calibrated by {args.method} in {seconds} s: {folder}")
    return 0


def _config(args: argparse.Namespace) -> mk.ModiffConfig:
    if args.mode == "float":
        raise UserError("--mode float: there is nothing to calibrate; choose modulated, quantized or weight_only")
    weight_only = args.mode == "weight_only"
    return mk.ModiffConfig(
        weight_bits=args.weight_bits,
        act_bits=None if weight_only else args.act_bits,
        mode="quantized" if args.mode == "quantized" else "modulated",
        scale_mode=args.scale_mode,
        group_size=args.group_size,
        backend=args.backend,
        granularity=args.granularity,
    )


def _options(method: str, items: list[str]) -> dict[str, Any]:
    """--set NAME=VALUE, each in the type of the option's default."""
    if method not in METHODS:
        raise UserError(f"--method {method}: not known; choose one of {', '.join(METHODS)}")
    types = {field.name: type(field.default) for field in dataclasses.fields(METHODS[method].options)}
    options: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in types:
            raise UserError(f"--set {item}: give NAME=VALUE, with one of the names {', '.join(types)}")
        try:
            options[name] = _parse(types[name], text)
        except ValueError as error:
            raise UserError(f"--set {item}: {name} is a {types[name].__name__}") from error
    return options


def _parse(kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return kind(text)
