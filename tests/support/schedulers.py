"""Scheduler configs as published with Stable Diffusion 1, 2, XL and Turbo."""

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
      "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
      "steps_offset": 1, "trained_betas": None, "clip_sample": False}
SD15 = {"_class_name": "PNDMScheduler", **SD}
SD21 = {"_class_name": "DDIMScheduler", **SD, "prediction_type": "v_prediction"}
SDXL = {"_class_name": "EulerDiscreteScheduler", **SD, "interpolation_type": "linear",
        "prediction_type": "epsilon", "sample_max_value": 1.0, "timestep_spacing": "leading",
        "use_karras_sigmas": False}
TURBO = {**SD15, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
