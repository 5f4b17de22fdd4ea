"""What one can train. A command NAME is the file of its name; the other files are what they share.

Around the training: stage.py. Batches and losses: fine_tuning.py and conditions.py of lora.py,
textual_inversion.py and unet.py; denoising.py and new_models.py of ddpm.py; round_trip.py,
perceptual.py and adversarial.py of autoencoder.py; contrastive.py and retrieval.py of clip.py.
"""
