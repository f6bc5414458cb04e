"""ImageNet, 1000 classes, 256 px: VQ-GAN f16 with 16,384 l2-normalised codes of 8 dimensions, and LlamaGen-B.

The tokenizer of LlamaGen (Sun et al. 2024, arXiv 2406.06525, VQ-16: 40 epochs at batch 128), after ViT-VQGAN (arXiv
2110.04627); averaged weights, a warm-up of the discriminator and replacement of unused codes are added.

Command: python -m vgpt_jax.main --config=configs/imagenet.py --workdir=DIR
Data: --config.data.manual_dir=DIR with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, prepared by the first run; or class
folders or shards, --config.data.name=image_folder --config.data.folder=DIR. The token cache of ten crops takes 6.6 GB.
Result: not yet run.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.update(name="imagenet2012", split="official", image_size=256, resize_size=288, crop="random")
    config.data.update(value_range=(-1.0, 1.0), cache_views="ten_crop")
    config.tokenizer.dtype = "bfloat16"
    config.vqgan.update(z_channels=256, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,))
    config.vector_quantize.update(
        num_codewords=16_384,
        embedding_dim=8,
        l2_norm=True,
        pretrain_steps=0,
        replace_freq=500,
        penalty_weight=0.0,
        commitment_weight=0.25,
        codebook_weight=1.0,
    )
    config.tokenizer_training.update(batch_size=128, num_steps=400_000, reconstruction="l2", ema_decay=0.999)
    config.tokenizer_training.optimizer.update(learning_rate=1e-4, b2=0.95, weight_decay=0.05, grad_clip=1.0)
    config.perceptual.update(name="lpips", weight=1.0)
    config.adversarial.update(start=20_000, warmup_steps=1000, ramp_steps=4000, weight=0.5)
    config.adversarial.optimizer.update(learning_rate=1e-4, b2=0.95, grad_clip=1.0)
    config.patchgan.dtype = "bfloat16"
    config.gpt.update(
        size="B",
        norm="rms_norm",
        mlp="swiglu",
        positions="rotary_2d",
        bias=False,
        tie_weights=False,
        class_dropout=0.1,
        dtype="bfloat16",
    )
    config.generator_training.update(batch_size=256, num_steps=1_500_000, ema_decay=0.9999)
    config.generator_training.optimizer.update(learning_rate=1e-4, b2=0.95, weight_decay=0.05, grad_clip=1.0)
    config.logging.update(log_every=100, eval_every=10_000, checkpoint_every=5000)
    return config
