"""CIFAR-10, 10 classes, 32 px: the VQ-VAE of the paper's authors with an EMA codebook, f4, so 8x8 tokens of 512 codes.

Sizes and hyperparameters of the example that DeepMind published with Sonnet for van den Oord et al. 2017 (arXiv
1711.00937): 128 channels, 2 residual blocks of 32, codes of 64 dimensions, commitment 0.25, decay 0.99, Adam 3e-4, batch 32.
The error is plain l2; there it is divided by the variance of the data.

Command: python -m vgpt_jax.main --config=configs/vqvae_cifar10.py --workdir=DIR
Result: not yet run. The data set is downloaded and prepared by the first run, or from cifar-10-binary.tar.gz in the folder
that --config.data.manual_dir=DIR names.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="cifar10", split="official", image_size=32, value_range=(-0.5, 0.5))
    config.tokenizer.update(architecture="vqvae", code_factorization=False)
    config.vqvae.update(z_channels=64, ch=128, num_downsamplings=2, num_res_blocks=2, res_channels=32)
    config.vector_quantize.update(
        num_codewords=512,
        embedding_dim=64,
        learning="ema",
        ema_decay=0.99,
        pretrain_steps=0,
        penalty_weight=0.0,
        commitment_weight=0.25,
    )
    config.tokenizer_training.update(batch_size=32, num_steps=50_000, reconstruction="l2")
    config.tokenizer_training.optimizer.learning_rate = 3e-4
    config.perceptual.name, config.adversarial.discriminator = "none", "none"
    config.gpt.update(d_model=256, num_layers=8, num_heads=8)
    config.generator_training.update(batch_size=64, num_steps=50_000)
    config.generator_training.optimizer.update(
        learning_rate=3e-4, b2=0.98, weight_decay=0.01, schedule="cosine", warmup_steps=1000, grad_clip=1.0
    )
    config.logging.update(log_every=100, eval_every=2500, checkpoint_every=2500)
    return config
