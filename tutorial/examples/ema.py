"""DDPO, and beside it an exponential moving average (EMA) of the weights.

    python train.py --algorithm tutorial/examples/ema.py:EMA --set decay=0.95

With every checkpoint the average is written into the run's folder, as checkpoints are: what reads
runs/NAME/checkpoints/000010 reads runs/NAME/ema/000010. Sampling is from the weights, as ever.
"""

import copy
from pathlib import Path

import unet
from ddpo import DDPO


class EMA(DDPO):
    """average <- decay average + (1 - decay) theta, after each update."""

    decay = 0.95
    updates = 0

    def setup(self, policy):
        """The average begins at the base model."""
        self.average = copy.deepcopy(policy.unet).requires_grad_(False)

    def batches(self, policy, records, prompts, weights, name):
        """DDPO's: when the next batch is asked for, an update has been taken."""
        for batch in super().batches(policy, records, prompts, weights, name):
            yield batch
            self.updates += 1
            for mean, p in zip(self.average.parameters(), policy.unet.parameters()):
                mean.lerp_(p.detach(), 1 - self.decay)

    def state_dict(self):
        """Called for each checkpoint: for JSON, so that weights go into a folder of their own."""
        folder = Path(self.settings.out) / "ema" / f"{self.updates:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.lora_rank:
            unet.save_tensors(unet.lora_weights(self.average), folder / unet.LORA)
        else:
            unet.save(self.average, folder / "unet")
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        """Called by --resume."""
        super().load_state_dict(state)
        self.updates = state["updates"]
        folder = Path(self.settings.out) / "ema" / f"{self.updates:06d}"
        if self.settings.lora_rank:
            unet.load_lora(self.average, folder)
        else:
            saved = unet.load(unet.UNet, folder / "unet")
            self.average.load_state_dict(saved.state_dict())
