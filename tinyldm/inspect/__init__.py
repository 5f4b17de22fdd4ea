"""What a checkpoint is, or how a picture was made: python -m tinyldm.inspect FILE."""
