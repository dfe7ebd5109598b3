"""A slow reward, such as a service's answer, for many pictures at a time.

    python train.py --reward tutorial/examples/together.py:together

`rate` stands for yours. One that blocks (requests, a library's plain client) goes into a thread:
`await asyncio.to_thread(ask, image, prompt)`. A failure ends the run in rate's own traceback; its
newest checkpoint stays.
"""

import asyncio

AT_A_TIME, SECONDS = 16, 60.0  # requests; for each of them


async def rate(image, prompt):
    """How blue a picture is, after a while. uint8 (H, W, 3), str -> a number."""
    await asyncio.sleep(0.05)
    return image[..., 2].mean() - image[..., :2].mean()


async def rate_all(images, prompts):
    """-> the scores, in the pictures' order."""
    limit = asyncio.Semaphore(AT_A_TIME)

    async def one(image, prompt):
        async with limit:
            return await asyncio.wait_for(rate(image, prompt), SECONDS)

    return await asyncio.gather(*map(one, images, prompts))


def together(images, prompts):
    """The reward: an ordinary function, with an event loop of its own."""
    return asyncio.run(rate_all(images, prompts))
