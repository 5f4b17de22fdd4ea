"""python -m tinyldm.training STAGE: the stages of the bundled model's recipe."""
from ..shapes.recipe import run

if __name__ == "__main__":
    run()
