"""Stanford Dogs, 120 breeds, 128 px: the published configuration of visual-gpt (VQ-GAN f16, K 4096, GPT-2 of 12 layers).

Command: python -m vgpt_jax.main --config=configs/stfdogs.py --workdir=DIR
Result: not yet run. The model, the optimizers and the schedules are here; the data set, the perceptual and the
adversarial loss are not.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="stanford_dogs", image_size=128, value_range=(0.0, 1.0), held_out_percent=5)
    config.vqgan.update(z_channels=256, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(8,))
    config.vector_quantize.update(
        num_codewords=4096,
        embedding_dim=12,
        cos_dist=True,
        replace_freq=20,
        replace_noise=0.01,
        pretrain_steps=5000,
        init_method="latent_random",
        penalty_weight=0.0,
        commitment_weight=2.0,
        codebook_weight=1.0,
    )
    config.tokenizer_training.update(batch_size=16, num_steps=150_000, reconstruction="l1")
    config.tokenizer_training.optimizer.update(learning_rate=4.5e-6, b1=0.5, b2=0.9)
    config.gpt.update(d_model=768, num_layers=12, num_heads=12)
    config.generator_training.update(batch_size=16, num_steps=100_000)
    config.generator_training.optimizer.update(
        learning_rate=5e-6, b2=0.98, weight_decay=1e-5, schedule="cosine", warmup_steps=10_000
    )
    config.logging.update(log_every=100, eval_every=5000, checkpoint_every=5000)
    return config
