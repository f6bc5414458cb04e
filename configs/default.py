"""Every field of a configuration, with its unit or consequence. The other files are deltas from this one.

Sections that carry the name of a class are its arguments. Derived elsewhere and so not here: the token grid, the length
of a sequence, the vocabulary, the number of classes.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def optimizer(learning_rate: float) -> ConfigDict:
    """Adam, or AdamW where there is weight decay."""
    return ConfigDict(
        {
            "learning_rate": learning_rate,  # the greatest of the schedule
            "schedule": "constant",  # "constant" or "cosine" (to a hundredth of the greatest at the last step)
            "warmup_steps": 0,  # linear from 0
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,  # on matrices and convolution kernels only
            "grad_clip": 0.0,  # greatest global norm of the gradients; 0: no clipping
        }
    )


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of weights, data order, augmentation, dropout, codebook surgery
    config.max_skipped_steps = (
        20  # a step whose gradients are not finite is skipped; more than these in a row end the run
    )
    config.stages = ("tokenizer", "generator", "classifier")  # trained in this order; finished ones are skipped

    config.mesh = ConfigDict(  # devices by axis; one may be -1: what the others leave over (docs/scaling.md)
        {
            "data": -1,  # each has a part of the batch, and all weights
            "fsdp": 1,  # each has a part of the batch, and a part of the weights, optimizer and averages
            "tensor": 1,  # each has a part of every layer's work
        }
    )

    config.data = ConfigDict(
        {
            "name": "emoji",  # "emoji", "image_folder", or a name of tensorflow-datasets: "stanford_dogs", "cifar10", ...
            "folder": "",  # image_folder: DIR with a folder for each class, or archives: DIR, a .zip, "train-{00..31}.tar"
            "on_corrupt": "error",  # image_folder: "error" stops at an unreadable image, "skip" leaves it out and counts it
            "emoji_label": "group",  # emoji: "group" (9 classes) or "subgroup" (98)
            "emoji_skin_tones": False,  # emoji: include the variants by skin tone
            "data_dir": "",  # tensorflow-datasets: where it is prepared; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
            "manual_dir": "",  # tensorflow-datasets: DIR with archives downloaded by hand, under their published names
            "split": "percent",  # tensorflow-datasets: "percent": all labelled pictures, held_out_percent of them held out;
            # "official": its train split, held out is its validation split, or else its test split
            "bounding_box": "first",  # tensorflow-datasets, where there are boxes: crop to the "first" one, or "none"
            "held_out_percent": 10,  # share of the pictures kept for evaluation, by a hash of their names
            "cache_dir": "",  # of rendered emoji and scans of image folders; "": $VGPT_JAX_CACHE or the user's cache folder
            "image_size": 64,  # pixels, of what the tokenizer sees
            "resize_size": 0,  # the short side is resized to this before cropping; 0: image_size
            "crop": "center",  # "center", "random" or "random_resized" (in training; evaluation crops the centre)
            "crop_scale": (0.8, 1.0),  # random_resized: share of the picture's area, least and greatest
            "crop_ratio": (3 / 4, 4 / 3),  # random_resized: width / height, least and greatest
            "flip": True,  # random horizontal flips in training, and mirrored views in the token cache
            "cache_views": "flip",  # of a picture in the token cache: "none" (1), "flip" (2), "ten_crop" (10) or "random"
            "cache_random_views": 8,  # number of the views of "random": fixed draws of training's crops and flips
            "value_range": (0.0, 1.0),  # of the images the networks see
        }
    )

    config.tokenizer = ConfigDict(
        {
            "architecture": "vqgan",  # "vqgan", "vqvae" or "maskgit_vqgan": which of the sections below is read
            "quantizer": "vector_quantize",  # which of the sections of quantizers is read
            "code_factorization": True,  # linear maps between latents and codes of another width
            "factorization_bias": False,  # of these maps: VQ-GAN's and LlamaGen's have biases, visual-gpt's have none
            "dtype": "float32",  # "bfloat16" on accelerators; parameters, losses and the quantizer are float32 always
        }
    )
    config.vqgan = ConfigDict(
        {
            "z_channels": 256,
            "ch": 128,
            "ch_mult": (1, 1, 2, 2, 4),  # one level more halves the token grid
            "num_res_blocks": 2,
            "attn_resolutions": (),  # pixels; only resolutions that the levels have
            "dropout": 0.0,
        }
    )
    config.vqvae = ConfigDict(
        {
            "z_channels": 64,
            "ch": 128,
            "num_downsamplings": 2,  # one more halves the token grid
            "num_res_blocks": 2,
            "res_channels": 32,
        }
    )
    config.maskgit_vqgan = ConfigDict(
        {
            "z_channels": 256,
            "ch": 128,
            "ch_mult": (1, 1, 2, 2, 4),  # one level more halves the token grid
            "num_res_blocks": 2,
        }
    )
    config.vector_quantize = ConfigDict(
        {
            "num_codewords": 1024,
            "embedding_dim": 256,
            "cos_dist": False,
            "proj_dim": placeholder(int),  # width of the space that is searched; None: no projection
            "random_proj": False,
            "penalty_weight": 0.25,
            "pretrain_steps": 5000,
            "init_method": "latent_random",  # "kaiming", "latent_random", "fixed"
            "replace_freq": 0,  # steps; 0: codes are never replaced
            "replace_noise": 0.01,
            "commitment_weight": 1.0,
            "codebook_weight": 1.0,
            "penalty_temperature": 0.05,
            "l2_norm": False,  # codes and latents on the unit sphere throughout
            "learning": "gradient",  # "gradient", "ema" or "alternating": how codes follow their latents
            "ema_decay": 0.99,
            "ema_epsilon": 1e-5,
            "kmeans_iterations": 10,
            "alternating_steps": 1,
            "alternating_rate": 0.1,
            "estimator": "straight_through",  # or "rotation"
            "sync_nu": 0.0,
            "affine": "none",  # "none", "learned" or "statistics"
            "entropy_weight": 0.0,
            "entropy_temperature": 0.01,
            "orthogonality_weight": 0.0,
        }
    )
    config.simvq = ConfigDict(
        {
            "num_codewords": 8192,
            "embedding_dim": 64,
            "commitment_weight": 0.25,
            "codebook_weight": 1.0,
            "estimator": "straight_through",  # or "rotation"
        }
    )
    config.ibq = ConfigDict(
        {
            "num_codewords": 16384,
            "embedding_dim": 256,
            "index_weight": 1.0,
            "codebook_weight": 1.0,
            "commitment_weight": 0.25,
            "entropy_weight": 0.05,
            "entropy_temperature": 0.01,
        }
    )
    config.diveq = ConfigDict(
        {
            "num_codewords": 1024,
            "embedding_dim": 64,
            "noise_variance": 0.001,
            "init_method": "latent_random",  # or "kaiming"
            "replace_freq": 100,
            "replace_noise": 0.01,
        }
    )
    config.fsq = ConfigDict({"levels": (8, 5, 5, 5)})  # of each dimension; K is their product
    config.lfq = ConfigDict(
        {
            "num_bits": 10,  # the width of the latents; K is 2 to that power
            "codebook_scale": 1.0,
            "entropy_weight": 0.1,
            "diversity_gamma": 1.0,
            "commitment_weight": 0.25,
            "inverse_temperature": 100.0,
            "entropy_group_bits": 9,
        }
    )
    config.bsq = ConfigDict(
        {
            "num_bits": 10,
            "entropy_weight": 0.1,
            "diversity_gamma": 1.0,
            "commitment_weight": 0.0,
            "inverse_temperature": 100.0,
            "entropy_group_bits": 1,
        }
    )
    # Composed quantizers: the section that ``quantizer`` names holds the arguments of what they are made of.
    config.grouped_quantize = ConfigDict({"quantizer": "vector_quantize", "num_groups": 2, "shared_codebook": False})
    config.residual_quantize = ConfigDict(
        {
            "quantizer": "vector_quantize",
            "num_quantizers": 4,
            "shared_codebook": False,
            "quantizer_dropout": 0.0,
            "depth_scale": 1.0,  # a power of 2: what a depth is divided by; below 1 for codes of a fixed size (LFQ: 0.5)
        }
    )
    config.multi_scale_quantize = ConfigDict(
        {
            "quantizer": "vector_quantize",
            "scales": (1, 2, 3, 4, 5, 6, 8),  # sides of the grids of tokens; the last must be that of the latents
            "phi_ratio": 0.5,
            "num_phi": 4,
            "commitment_weight": 0.25,
            "codebook_weight": 1.0,
        }
    )
    config.tokenizer_training = ConfigDict(
        {
            "batch_size": 16,  # pictures a step, over all devices
            "num_steps": 150_000,
            "reconstruction": "l1",  # "l1" or "l2"
            "ema_decay": 0.0,  # of the averaged weights, which are evaluated and saved; 0: the last ones are
            "accumulate": 1,  # parts of a batch that are computed one after the other, for batches that memory does not hold
            "remat": "none",  # what a step keeps for its gradient: "none": everything, "dots", "blocks": the least
            "model_from": "last",  # what is saved at the end: the weights of the "last" step, or of the "best" checkpoint
            "init_from": "",  # folder of a trained tokenizer to start from, which decides the sections above but loss weights
            "optimizer": optimizer(4.5e-6),
        }
    )
    config.perceptual = ConfigDict(
        {
            "name": "efficientnet",  # "efficientnet" (installed), "lpips" (fetches VGG16 or reads vgg_file), "none"
            "weight": 1.0,
            "vgg_file": "",  # vgg16-397923af.pth of torchvision, for LPIPS as loss and as metric
        }
    )
    config.adversarial = ConfigDict(
        {
            "discriminator": "patchgan",  # "patchgan", "stylegan_discriminator" (the sections below), "none"
            "start": 0.33,  # when the discriminator begins: steps, or below 1 a share of num_steps
            "warmup_steps": 500,  # then it learns for so long before the autoencoder hears it
            "ramp_steps": 500,  # and in so many its weight rises to the full
            "loss": "hinge",  # "hinge", "vanilla" or "non_saturating"
            "weight": 0.8,
            "max_adaptive_weight": 1e4,  # bound of the adaptive weight; 0: no adaptive weight
            "lecam_weight": 0.0,
            "r1_weight": 0.0,
            "diff_augment": (),  # any of "color", "translation", "cutout"
            "optimizer": optimizer(4.5e-6),
        }
    )
    config.patchgan = ConfigDict(
        {
            "ndf": 64,
            "num_layers": 3,
            "norm": "batch",  # "batch", "group" or "none"
            "spectral_norm": False,
            "dtype": "float32",
        }
    )
    config.stylegan_discriminator = ConfigDict(
        {
            "ch": 64,
            "max_ch": 512,
            "blur": (1, 3, 3, 1),
            "stddev_group": 4,
            "dtype": "float32",
        }
    )

    config.gpt = ConfigDict(
        {
            "size": "",  # "S", "B", "L", "XL", "XXL" or "3B": the three below by name; "": they count
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "num_kv_heads": 0,  # heads of keys and values, shared by the queries'; 0: num_heads
            "norm": "layer_norm",  # GPT-2's block: "layer_norm", "gelu", "learned", bias; Llama's: "rms_norm", "swiglu",
            "norm_epsilon": 1e-5,
            "mlp": "gelu",  # "rotary_2d", no bias; and "gelu_exact"
            "mlp_width": 0,  # 0: 4 D, of "swiglu" two thirds of that
            "positions": "learned",  # "learned", "rotary", "rotary_2d" or "rotary_llamagen"
            "rotary_base": 10_000.0,
            "num_positions": 0,  # rows of the table of learned positions; 0: as many as there are
            "qk_norm": False,
            "bias": True,
            "conditioning": "token",  # "token", "adaptive_norm" or "both": how the class comes in
            "random_order": False,  # targets are told: trained in random orders, and writes in any
            "embedding_dropout": 0.1,
            "residual_dropout": 0.1,
            "attention_dropout": 0.1,
            "token_dropout": 0.0,  # share of the input tokens that are hidden
            "class_dropout": 0.0,  # share of the pictures whose class is hidden; guidance needs some, 0.1
            "drop_path": 0.0,
            "tie_weights": True,
            "dtype": "float32",
        }
    )
    config.generator_training = ConfigDict(
        {
            "batch_size": 16,
            "num_steps": 100_000,
            "random_until": 0.5,  # with gpt.random_order: share of num_steps up to which every order is random;
            "raster_from": 0.75,  # from there fewer and fewer, and from this share on none. 1 and 1: random throughout
            "ema_decay": 0.0,  # of the averaged weights, which are evaluated and saved; 0: the last ones are
            "accumulate": 1,
            "remat": "none",
            "model_from": "last",
            "init_from": "",  # folder of a trained generator to start from, which decides the gpt section but dropout rates
            "optimizer": optimizer(5e-6),
        }
    )

    config.classifier = ConfigDict(
        {
            "widths": (32, 64, 128, 256),  # one level more halves the resolution again
            "dropout": 0.3,
        }
    )
    config.classifier_training = ConfigDict(
        {
            "batch_size": 32,
            "num_steps": 1000,
            "label_smoothing": 0.1,
            "accumulate": 1,
            "remat": "none",
            "model_from": "last",
            "init_from": "",  # folder of a trained classifier to start from, which decides the classifier section
            "optimizer": optimizer(1e-3),
        }
    )

    config.sampling = ConfigDict(
        {  # of the pictures drawn while the generator trains, and by vgpt_jax.evaluate
            "temperature": 1.0,
            "top_k": 100,  # 0: all codes
            "top_p": 0.95,  # 1: all codes
            "min_p": 0.0,  # least probability, as a share of the most probable code's; 0: all codes
            "guidance": 1.0,  # scale; 1: none
            "guidance_schedule": "constant",  # "constant", "linear", "power_cosine" or "cut_off"
            "guidance_power": 1.0,  # of "power_cosine", or the share of the tokens that "cut_off" guides
            "order": "raster",  # or "random", with gpt.random_order
            "num_steps": 0,  # with gpt.random_order: steps of several tokens each; 0: a token a step
            "num": 4,  # pictures a class, for at most 12 classes
        }
    )

    config.logging = ConfigDict(
        {  # may change between a run and its resumption, as ``sampling`` and ``stages`` may
            "log_every": 50,  # steps
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,  # the newest ones
            "keep_best": 1,  # and those with the best PSNR, nats a token, or cross-entropy on held-out pictures
            "wandb_project": "",  # "": none; needs the extra "wandb"
        }
    )
    return config
