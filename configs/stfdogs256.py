"""Stanford Dogs at 256 px, as in visual-gpt's published pictures: ``stfdogs.py`` with 16x16 tokens.

Command: python -m vgpt_jax.main --config=configs/stfdogs256.py --workdir=DIR
Result: not yet run; see ``stfdogs.py``.
"""

from configs import stfdogs


def get_config():
    config = stfdogs.get_config()
    config.data.image_size = 256
    config.vqgan.attn_resolutions = (16,)
    return config
