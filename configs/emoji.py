"""Emoji at 48 px in 9 classes: the whole pipeline on two CPU cores.

A VQ-VAE (arXiv 1711.00937) at f4, so 12x12 tokens of 512 codes, and a GPT-2 of 1.3M parameters. The set is drawn at 52
px and cropped to 48 at random, which is all the augmentation there is beside flips.

Command: bash launch/quickstart.sh, or python -m vgpt_jax.main --config=configs/emoji.py --workdir=runs/emoji
Hardware: two CPU cores (AMD EPYC), beside a test suite that used both. Time: tokenizer 5:54, generator 10:03, classifier 3:00.
Result, held-out: PSNR 22.03 dB, SSIM 0.874, all codes in use; 1.969 nats a token, where single tokens have 5.678; classifier
accuracy 71.7 %; its score of a sample's class, at guidance 2, 0.473, of the best of 16 0.806.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="emoji", image_size=48, resize_size=52, crop="random")
    config.tokenizer.architecture = "vqvae"
    config.vqvae.update(z_channels=64, ch=64)
    config.vector_quantize.update(
        num_codewords=512,
        embedding_dim=8,
        learning="ema",
        init_method="kmeans",
        pretrain_steps=200,
        replace_freq=50,
        penalty_weight=0.0,
        commitment_weight=0.25,
    )
    config.tokenizer_training.update(batch_size=16, num_steps=5000, reconstruction="l2")
    config.tokenizer_training.optimizer.update(
        learning_rate=1e-3, schedule="cosine", warmup_steps=100, b2=0.99, grad_clip=1.0
    )
    config.perceptual.name, config.adversarial.discriminator = "none", "none"
    config.gpt.update(d_model=128, num_layers=6, num_heads=4, attention_dropout=0.0, class_dropout=0.1)
    config.generator_training.update(batch_size=16, num_steps=1700)
    config.generator_training.optimizer.update(
        learning_rate=2e-3, schedule="cosine", warmup_steps=50, b2=0.98, weight_decay=0.05, grad_clip=1.0
    )
    config.classifier_training.update(num_steps=800)
    config.classifier_training.optimizer.update(schedule="cosine", warmup_steps=50, weight_decay=0.05, grad_clip=1.0)
    config.sampling.update(temperature=0.9, top_k=100, top_p=0.95, guidance=2.0)
    config.logging.update(eval_every=500, checkpoint_every=250)
    return config
