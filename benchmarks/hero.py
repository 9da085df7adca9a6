"""The picture that opens the README: a trained swarm beside the baselines, from the same start. 10 seconds:

    python ppo_swarm.py
    python benchmarks/hero.py runs/NAME/model.pt --out docs/swarm.gif

From the repository's root. The model is one of ppo_swarm.py on Swarm; the world is the one it was trained in. Prints
the mean reward per agent-step of each on 100 held-out episodes, the number over its picture, and the size of the file:
0.35 MB for 10 agents, 0.75 MB for 24, 1 MB for 40. By the default reward a trained swarm ends as a single point; one
that was trained with `--env-kwargs separation_weight 0.1` does not.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from common import evaluate, load_policy

import envs


@dataclass
class Options:
    model: tyro.conf.Positional[Path]  # a model.pt of ppo_swarm.py
    out: Path = Path("docs/swarm.gif")
    seed: int = envs.TEST_SEED  # of the start
    steps: int = 60  # of the episode; each is three pictures
    size: int = 256  # of a panel, in pixels
    trail: int = 20  # pictures for which an agent's way stays visible


def film(make_policy, options, **env_kwargs):
    """Pictures of the beginning of an episode, three for each step, with dots where every agent has just been."""
    world = envs.make_vec("Swarm", 1, 0, render_mode="rgb_array", **env_kwargs)
    policy = make_policy(world)
    position = world.state.position
    direction = world.state.direction
    params = world.params
    observations, infos = world.reset(seed=options.seed)
    pictures = [world.draw(0, options.size)] * 8  # the start, for half a second
    dots = []  # the pixels of the agents in each picture, and their colours
    for _ in range(options.steps):
        observations, _, _, _, infos = world.step(policy(observations, infos))
        end = position.copy()
        for left in (2 / 3, 1 / 3, 0):  # of the step: an agent first turns, then goes straight
            position[...] = (end - left * params.speed * params.dt * direction) % params.box_size
            picture = world.draw(0, options.size)
            x, y = (position[0] * options.size / params.box_size).astype(int).T
            row = options.size - 1 - y
            dots.append((row, x, picture[row, x] // 2 + 127))  # an agent has the colour of its heading
            for (row, column, color), down, right in product(dots[-options.trail - 1 : -1], (0, -1), (0, -1)):
                pixels = (row + down, column + right)  # -1 is the other side of the box, as it should be
                picture[pixels] = np.minimum(picture[pixels], color)
            pictures.append(picture)
    return pictures


def main(options):
    args = envs.load(options.model)["args"]
    env_kwargs = {"n_agents": args["n_agents"], **args["env_kwargs"]}
    entries = {"trained": (load_policy("ppo_swarm", options.model), env_kwargs)}
    entries |= envs.baselines("Swarm", **env_kwargs)
    films = {}
    for name, (make_policy, kwargs) in entries.items():
        stats = evaluate(make_policy, "Swarm", **kwargs)
        caption = f"{name}   {(stats['r'] / stats['l']).mean():.2f}"
        print(caption)
        films[caption] = film(make_policy, options, **kwargs)
    # One palette for all pictures and no dithering: only what moves is then stored. A GIF counts time in 1/100 s.
    palette = "split[a][b];[a]palettegen=max_colors=32:stats_mode=diff[c];[b][c]paletteuse=dither=none"
    parameters = dict(codec="gif", pixel_format="rgb24", ffmpeg_params=["-filter_complex", palette])
    envs.write_video(films, str(options.out), fps=100 / 6, **parameters)
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
