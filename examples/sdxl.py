"""Sample Stable Diffusion XL with low-bit layers; the code is that of examples/stable_diffusion.py.

python examples/sdxl.py --prompt "a lighthouse in a storm" --steps 30 --compare --out both.png"""

from __future__ import annotations

from stable_diffusion import main as main_for


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    return main_for(argv, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0")


if __name__ == "__main__":
    raise SystemExit(main())
