"""The reward of chapter 0. A reward may be any function of pixels and prompts."""


def redness(images, prompts):
    """How much more red than green and blue there is. uint8 (B, H, W, 3) -> (B,)."""
    return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))
