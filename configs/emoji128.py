"""Emoji at 128 px in 9 classes, for a GPU: VQ-GAN f8, so 16x16 tokens of 1024 codes, with perceptual and adversarial loss.

Command: python -m vgpt_jax.main --config=configs/emoji128.py --workdir=runs/emoji128
Result: not yet run.
"""

from configs import emoji


def get_config():
    config = emoji.get_config()
    config.data.update(image_size=128, resize_size=140)
    config.tokenizer.update(architecture="vqgan", dtype="bfloat16")
    config.vqgan.update(z_channels=128, ch=64, ch_mult=(1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,))
    config.vector_quantize.update(num_codewords=1024, pretrain_steps=500, replace_freq=100)
    config.tokenizer_training.update(batch_size=32, num_steps=20_000, reconstruction="l1", ema_decay=0.999)
    config.tokenizer_training.optimizer.update(learning_rate=3e-4, warmup_steps=500)
    config.perceptual.update(name="efficientnet", weight=0.5)
    config.adversarial.update(
        discriminator="patchgan", start=0.5, warmup_steps=500, ramp_steps=1000, weight=0.2, lecam_weight=0.01
    )
    config.adversarial.optimizer.update(learning_rate=3e-4, b1=0.5, b2=0.99, grad_clip=1.0)
    config.patchgan.update(norm="group", dtype="bfloat16")
    config.gpt.update(d_model=384, num_layers=8, num_heads=6, dtype="bfloat16")
    config.generator_training.update(batch_size=64, num_steps=10_000, ema_decay=0.999)
    config.generator_training.optimizer.update(learning_rate=1e-3, warmup_steps=500)
    return config
