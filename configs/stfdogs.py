"""Stanford Dogs, 120 breeds, 128 px: the published configuration of visual-gpt (VQ-GAN f16, K 4096, GPT-2 of 12 layers).

Command: python -m vgpt_jax.main --config=configs/stfdogs.py --workdir=DIR
Result: not yet run. Models, losses, optimizers and schedules are the published ones, and so are 5 % of all 20,580 pictures
held out, each cropped to its first bounding box. The data set is downloaded and prepared by the first run; without a network,
--config.data.manual_dir=DIR names a folder with images.tar, annotation.tar and lists.tar. LPIPS needs torchvision's
vgg16-397923af.pth: --config.perceptual.vgg_file=PATH, or else it is fetched; without either,
--config.perceptual.name=efficientnet needs nothing.

Differs from visual-gpt: the adaptive weight is over L1 and LPIPS together, and LPIPS is given images in the range that it
was trained on.
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
    config.perceptual.update(name="lpips", weight=1.0)
    config.adversarial.update(
        discriminator="patchgan", start=50_000, warmup_steps=0, ramp_steps=0, loss="hinge", weight=0.8
    )
    config.adversarial.optimizer.update(learning_rate=4.5e-6, b1=0.5, b2=0.9)
    config.patchgan.update(ndf=64, num_layers=3, norm="batch")
    config.gpt.update(d_model=768, num_layers=12, num_heads=12)
    config.generator_training.update(batch_size=16, num_steps=100_000)
    config.generator_training.optimizer.update(
        learning_rate=5e-6, b2=0.98, weight_decay=1e-5, schedule="cosine", warmup_steps=10_000
    )
    config.logging.update(log_every=100, eval_every=5000, checkpoint_every=5000)
    return config
