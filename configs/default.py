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
    config.stages = ("tokenizer", "generator", "classifier")  # trained in this order; finished ones are skipped

    config.data = ConfigDict(
        {
            "name": "emoji",  # "emoji" or "image_folder"
            "folder": "",  # image_folder: DIR with a folder for each class
            "on_corrupt": "error",  # image_folder: "error" stops at an unreadable image, "skip" leaves it out and counts it
            "emoji_label": "group",  # emoji: "group" (9 classes) or "subgroup" (98)
            "emoji_skin_tones": False,  # emoji: include the variants by skin tone
            "held_out_percent": 10,  # share of the pictures kept for evaluation, by a hash of their names
            "cache_dir": "",  # of rendered emoji and folder scans; "": $VGPT_JAX_CACHE or the user's cache folder
            "image_size": 64,  # pixels, of what the tokenizer sees
            "resize_size": 0,  # the short side is resized to this before cropping; 0: image_size
            "crop": "center",  # "center" or "random" (in training; evaluation crops the centre)
            "flip": True,  # random horizontal flips in training
            "value_range": (0.0, 1.0),  # of the images the networks see
        }
    )

    config.tokenizer = ConfigDict(
        {
            "architecture": "vqgan",  # "vqgan" or "vqvae": which of the two sections below is read
            "quantizer": "vector_quantize",
            "code_factorization": True,  # linear maps between latents and codes of another width
            "dtype": "float32",  # "bfloat16" on accelerators
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
        }
    )
    config.tokenizer_training = ConfigDict(
        {
            "batch_size": 16,  # pictures a step, over all devices
            "num_steps": 150_000,
            "reconstruction": "l1",  # "l1" or "l2"
            "init_from": "",  # folder of a trained tokenizer to start from
            "optimizer": optimizer(4.5e-6),
        }
    )

    config.gpt = ConfigDict(
        {
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "num_positions": 0,  # rows of the position table; 0: the tokens of a picture
            "embedding_dropout": 0.1,
            "residual_dropout": 0.1,
            "attention_dropout": 0.1,
            "tie_weights": True,
            "dtype": "float32",
        }
    )
    config.generator_training = ConfigDict(
        {
            "batch_size": 16,
            "num_steps": 100_000,
            "unconditional_share": 0.0,  # share of the sequences that begin with the begin token instead of their class
            "init_from": "",  # folder of a trained generator to start from
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
            "init_from": "",  # folder of a trained classifier to start from
            "optimizer": optimizer(1e-3),
        }
    )

    config.sampling = ConfigDict(
        {  # of the pictures drawn while the generator trains, and by vgpt_jax.evaluate
            "temperature": 1.0,
            "top_k": 100,  # 0: all codes
            "top_p": 0.95,  # 1: all codes
            "num": 4,  # pictures a class, for at most 12 classes
        }
    )

    config.logging = ConfigDict(
        {  # may change between a run and its resumption, as ``sampling`` and ``stages`` may
            "log_every": 50,  # steps
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "keep_checkpoints": 2,
            "wandb_project": "",  # "": none; needs the extra "wandb"
        }
    )
    return config
