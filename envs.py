"""Environments for reinforcement learning in swarms: numba kernels that step a whole batch at once.

In order:

    Use              `make_vec`, the one way in, and what every environment promises
    Write one        `NativeVectorEnv`, the base of the native environments, and what a batch writes a step into
    Randomness       one counter-based generator per environment
    Grid             points sorted into cells, so that neighbours are looked for nearby only
    Neighbors        the nearest others of an agent, and how it observes them
    Swarm            flocking in a periodic box, and the Vicsek model
    LidarNavigation  robots with wheels and a lidar among walls and obstacles, and two drivers
    VmasNavigation   the navigation scenario of VMAS, step for step, and a rule for it
    Baselines        random actions, and what each environment is measured against
    Evaluation       held-out episodes, the comparison table, plot and side-by-side video
    Arguments        the command line of a script, ranges, the processes of a torchrun
    Runs             the class `Run`: folder, logs, evaluations, signals, and files that survive a crash
    Vectorizer       any environment on a pool of forked workers, batches in shared memory; streams of such workers
    Adapters         one native environment alone, as Gymnasium's `Env` or PettingZoo's `ParallelEnv`
    Checks           of arguments, actions, seeds and states: a ValueError that names what is wrong
    Lunar Lander     Gymnasium's LunarLander-v3, its Box2D physics included, and its heuristic
    Native ids       what `make_vec` finds by name

Units: lengths in the environment's own unit, angles in radians, times in its own or in steps. Arrays that are returned
are C-contiguous; `num_envs` comes first, then `n_agents`. Observations and continuous actions are float32, discrete
actions and indices integers (as are Gymnasium's integer observations); physics is float64, but Box2D's float32 in Lunar
Lander.
"""

import atexit
import collections
import contextlib
import dataclasses
import glob
import importlib
import inspect
import io
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.pool
import numbers
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import find_highest_version, get_env_id, parse_env_id
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numba import njit
from numba.core.caching import FunctionCache


class KernelCache(FunctionCache):
    """numba's compiled functions on disk, where a file that cannot be read or written only costs time.

    With `njit(cache=True)` an empty file, as a power cut leaves them, or a full disk ends every program.
    """

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except Exception as error:  # whatever unpickling a damaged file comes to
            warnings.warn(f"compiled anew, because of a damaged file in {self.cache_path}: {error!r}", stacklevel=1)
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *args):
        try:
            super().save_overload(*args)
        except Exception as error:
            warnings.warn(f"compiled, but not kept in {self.cache_path}: {error!r}", stacklevel=1)


def kernel(function, **options):
    """`function` compiled by numba, and kept on disk where there is a place for it."""
    compiled = njit(error_model="numpy", **options)(function)  # "numpy": dividing by zero needs no branch
    try:
        compiled._cache = KernelCache(function)
    except RuntimeError:
        place = "NUMBA_CACHE_DIR may name a folder to keep them in"
        warnings.warn(f"kernels are compiled anew by every program, which takes minutes: {place}", stacklevel=1)
    return compiled


# For functions that take a whole state: passing such tuples of arrays costs more than stepping ten agents.
inlined = partial(kernel, forceinline=True)

# ----------------------------------------------------------------------------------------------------------------------
# Use
# ----------------------------------------------------------------------------------------------------------------------


def make_vec(
    env_id,
    num_envs,
    num_workers=None,
    render_mode=None,
    autoreset_mode=AutoresetMode.SAME_STEP,
    episode_info=True,
    **env_kwargs,
):
    """Build `num_envs` environments that step together, as one `gymnasium.vector.VectorEnv`.

    env_id        a native id (NATIVE_ENVS lists them) or any id that `gymnasium.make` knows; "module:id" for one that
                  this module adds to NATIVE_ENVS or registers with Gymnasium
    num_workers   processes to step in; 0 steps in this process; None picks by what is being stepped
    render_mode   None, "rgb_array" or "human"
    env_kwargs    arguments of the environment's class, or of `gymnasium.make`

    Every environment made here keeps the same promises (`autoreset_mode` and `episode_info`: see the end):

    - `step` returns observations (num_envs, ...), rewards (num_envs,) or, unlike Gymnasium's, (num_envs, n_agents) of
      many agents, terminations and truncations (num_envs,), and infos.
    - It resets an episode that ended in that same step: the returned observation is the next episode's first, and
      `infos["final_obs"]` (num_envs, ...) holds the ended episode's last, valid where `infos["_final_obs"]` is True;
      "final_info" and "_final_info" likewise, of the other infos.
    - `infos["episode"]` has the return "r", the length "l" and the environment's own metrics, each (num_envs,), valid
      where `infos["_episode"]` is True. All of these are present only on steps in which an episode ended.
    - Returned arrays are copies: the next step leaves them as they are.
    - The same seed gives the same trajectories for any number of workers. With a list of seeds, each environment goes
      as it would alone with its own. Gymnasium environments may draw from the global generators of NumPy and Python:
      `reset(seed=...)` seeds these, too, then for this number of workers; `close` puts back what the caller had.
    - `reset(seed=..., options={"identical": n})` starts the environments in groups of n, each as the first of its group
      starts with that seed, or all alike with True; after that, each draws random numbers of its own. With
      `options={"stagger": True}` the first episodes of native environments begin at different points of their time.

    Raises ValueError, before anything starts, that names the argument, its value and what is allowed; for an argument
    that the environment does not have, TypeError, as Python does.

    What is written for Gymnasium's own vector environments takes `autoreset_mode=AutoresetMode.NEXT_STEP`: an episode
    that ended is reset by the next step, which ignores its action and returns reward 0, and no infos are called final.
    The episodes of a seed are the same ones. With `episode_info=False`, the name "episode" is left to Gymnasium's
    RecordEpisodeStatistics, and the metrics are infos by themselves: "success", valid where "_success" is True.
    """
    num_envs = _integer("num_envs", num_envs, 1, LARGEST_SIZE)
    if num_workers is not None:
        num_workers = _integer("num_workers", num_workers, 0, num_envs)
    autoreset_mode = _valid_mode(autoreset_mode)
    native = find_native(env_id)
    make_slice = native or partial(GymnasiumVectorEnv, env_id)
    if native:
        known = [name for name in inspect.signature(make_slice).parameters if name not in ("num_envs", "first_env")]
        for name in set(env_kwargs) - set(known):
            unexpected = f"got an unexpected keyword argument {name!r}"  # what callers that try arguments out look for
            allowed = f"{env_id} has no such argument, but {', '.join(known)}"
            raise TypeError(f"{name} is {env_kwargs[name]!r}: {allowed} ({unexpected})")
    for name in {"first_env", "disable_env_checker"} & set(env_kwargs):
        raise ValueError(f"{name} is {env_kwargs[name]!r}: it is set here, and must be left out")
    make_slice = partial(make_slice, render_mode=render_mode, **env_kwargs)
    make_slice = partial(_make_slice, make_slice, autoreset_mode, episode_info)
    if render_mode == "human" and num_workers:
        raise ValueError(f"num_workers is {num_workers}: a window (render_mode 'human') needs 0")
    if num_workers is None:
        num_workers = min(count_cores(), num_envs)
        too_small = native and num_envs * make_slice(1).buffers["rewards"].size < POOL_AGENTS
        daemonic = multiprocessing.current_process().daemon  # say, of a sweep: it may start no processes
        # One worker would only add the way to it and back.
        if num_workers == 1 or too_small or daemonic or render_mode == "human":
            num_workers = 0
    if num_workers > 0 and "fork" not in multiprocessing.get_all_start_methods():
        warnings.warn("workers need fork, which this system lacks: stepping in this process", stacklevel=2)
        num_workers = 0
    envs = PoolVectorEnv(make_slice, num_envs, num_workers) if num_workers else make_slice(num_envs)
    rewards = envs.buffers["rewards"]
    if rewards.ndim > 1:  # TorchRL's name for what Gymnasium has no name for
        envs.reward_space = gym.spaces.Box(-np.inf, np.inf, rewards.shape, rewards.dtype)
    return envs


def find_native(env_id):
    """The class of a native id, None for all other ids. The module of "module:id" is imported: it may add a class."""
    if not isinstance(env_id, str):
        return None
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise ValueError(f"env_id is {env_id!r}: {module} must be a module to import ({error!r})") from error
    return NATIVE_ENVS.get(name)


def _make_slice(make_envs, autoreset_mode, episode_info, num_envs, first_env=0):
    """`make_envs`, with what no class of environments has to know when it is made."""
    envs = make_envs(num_envs, first_env=first_env)
    envs.autoreset_mode = autoreset_mode
    envs.metadata = envs.metadata | {"autoreset_mode": autoreset_mode}
    envs.episode_info = episode_info
    return envs


# ----------------------------------------------------------------------------------------------------------------------
# Write one
# ----------------------------------------------------------------------------------------------------------------------


class Outputs(NamedTuple):
    """The buffers of a native environment, for its kernels; without `n_agents` where there is one agent only."""

    observations: np.ndarray  # (num_envs, n_agents, obs_dim)
    final_observations: np.ndarray  # of the episodes that end in this step
    rewards: np.ndarray  # (num_envs, n_agents)
    terminations: np.ndarray  # (num_envs,)
    truncations: np.ndarray  # (num_envs,)
    stats: np.ndarray  # (num_envs, len(stat_names)), of the episodes that end in this step
    neighbors: np.ndarray | None = None  # (num_envs, n_agents, n_neighbors), indices, where an environment tells them
    final_neighbors: np.ndarray | None = None
    unseen: np.ndarray | None = None  # (num_envs, n_agents, unseen_dim), likewise: what observations hide
    final_unseen: np.ndarray | None = None


def _make_buffers(num_envs, observation_space, reward_shape, stat_names):
    """The arrays that a batch writes a step into; a native environment adds its infos."""
    return {
        "observations": np.zeros((num_envs, *observation_space.shape), observation_space.dtype),
        "final_observations": np.zeros((num_envs, *observation_space.shape), observation_space.dtype),
        "rewards": np.zeros((num_envs, *reward_shape), np.float32),
        "terminations": np.zeros(num_envs, bool),
        "truncations": np.zeros(num_envs, bool),
        "stats": np.zeros((num_envs, len(stat_names))),
    }


def _collect(envs):
    """What `step` returns, copied out of the buffers of a batch (any slice env's, or the pool's shared ones)."""
    buffers = envs.buffers
    observations = buffers["observations"].copy()
    terminations = buffers["terminations"].copy()
    truncations = buffers["truncations"].copy()
    infos = {name: buffers[name].copy() for name in envs.info_names}
    done = terminations | truncations  # (num_envs,)
    if np.count_nonzero(done):  # several times faster than any()
        if envs.autoreset_mode is AutoresetMode.SAME_STEP:
            infos["final_obs"] = buffers["final_observations"].copy()
            infos["_final_obs"] = done
            infos["final_info"] = {name: buffers["final_" + name].copy() for name in envs.info_names}
            infos["_final_info"] = done
        else:
            observations[done] = buffers["final_observations"][done]
            for name in envs.info_names:
                infos[name][done] = buffers["final_" + name][done]
        stats = dict(zip(envs.stat_names, buffers["stats"].T.copy(), strict=True))
        if envs.episode_info:
            infos["episode"] = stats
            infos["_episode"] = done
        else:
            for name in envs.stat_names[2:]:  # after "r" and "l"
                infos[name] = stats[name]
                infos["_" + name] = done
    return observations, buffers["rewards"].copy(), terminations, truncations, infos


GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, without their integer parts, are spread evenly, however many


class NativeVectorEnv(gym.vector.VectorEnv):
    """What the native environments share: buffers, autoreset, seeding, state and rendering.

        observations (num_envs, n_agents, obs_dim)     rewards (num_envs, n_agents)
        actions      (num_envs, n_agents, act_dim)     terminations, truncations (num_envs,)

    A subclass

    - declares its spaces to `__init__`;
    - sets `state`, a NamedTuple of arrays (num_envs first) that holds all the future depends on, among them `rng`
      (num_envs, 2); if they are views of something, as a property, because copying an object parts views from arrays;
    - names in `start_shapes` the arrays that a start may be given as, with their shapes, and in `start_bounds` those
      that have bounds, {name: (low, high)};
    - has `restart(start)` (new episodes), `observe()` (state to buffers), `advance(actions)` (one step, into buffers)
      and `draw(env)` (a picture).

    If its episodes are cut off at `max_steps` steps, counted in `state.elapsed`, it sets the attribute `max_steps`, so
    that `reset(options={"stagger": True})` can begin the first episodes at different points of that time: those of a
    batch then never end together, and a rollout that is shorter than an episode holds all its parts.

    The vectorizer puts views of shared memory in the place of `buffers`. `first_env` is the index of this slice's first
    environment in the whole batch, so that every environment has randomness of its own.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array", "human"], "render_fps": 30}
    autoreset_mode = AutoresetMode.SAME_STEP
    episode_info = True
    info_names = ()  # buffers that come along in `infos`, and as "final_" + name when an episode ends
    unseen_dim = 0  # length of infos["unseen"] of an agent
    has_state = True  # whether get_state and set_state work
    stat_names = ("r", "l")  # columns of buffers["stats"]
    max_steps = None
    start_shapes = {}
    start_bounds = {}

    def __init__(self, num_envs, observation_space, action_space, render_mode=None, first_env=0):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}: it must be None, 'rgb_array' or 'human'")
        check_range(type(self).__name__, action_space)
        self.num_envs = _integer("num_envs", num_envs, 1, LARGEST_SIZE)
        self.first_env = _integer("first_env", first_env, 0)
        self.render_mode = render_mode
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.buffers = _make_buffers(num_envs, observation_space, observation_space.shape[:-1], self.stat_names)
        self.window = None
        self.clock = None  # of the window
        self.started = False

    def __getstate__(self):
        return self.__dict__ | {"window": None, "clock": None}  # a copy opens a window of its own

    def draw(self, env):
        raise NotImplementedError(f"{type(self).__name__} has no draw(env), which returns a picture")

    def reset(self, *, seed=None, options=None):
        """Start new episodes everywhere; returns (observations, infos). Without a seed the streams run on."""
        _check_open(self)
        seed = _valid_seed(seed, self.num_envs)
        options = dict(options or {})
        group = _pop_identical(options, seed)
        stagger = _pop_stagger(options)
        start = _valid_start(options, self, self.num_envs)
        if seed is None and not self.started:
            seed = np.random.SeedSequence().entropy % 2**63
        if seed is not None:
            seeds = np.broadcast_to(np.uint64(seed), self.num_envs)
            index = self.first_env + np.arange(self.num_envs)  # tells apart environments of one seed
            if isinstance(seed, list):
                index[:] = 0
            _seed_rng(self.state.rng, seeds, index)
            self.started = True
        streams = self.state.rng.copy()
        if group > 1:
            _seed_rng(self.state.rng, seeds, index // group * group)
        self.restart(start)
        if group > 1:
            self.state.rng[...] = streams
        if stagger and self.max_steps:
            index = self.first_env + np.arange(self.num_envs)
            self.state.elapsed[...] = self.max_steps * (GOLDEN_RATIO * index % 1.0)
        return self._observed()

    def step(self, actions):
        _check_steppable(self)
        self.proceed(_valid_actions(actions, self.action_space))
        return _collect(self)

    def proceed(self, actions):
        """`advance` in the present autoreset mode."""
        if self.autoreset_mode is AutoresetMode.SAME_STEP or not np.count_nonzero(self._ended()):
            self.advance(actions)
            return
        # What ended in the last step has been reset, and stands still now. The kernels step the whole batch, so these
        # environments are put back afterwards.
        ended = np.flatnonzero(self._ended())
        state = self.state
        starts = [array[ended] for array in state]
        self.advance(actions)
        for array, start in zip(state, starts, strict=True):
            array[ended] = start
        self.observe()
        for name in ("rewards", "terminations", "truncations"):
            self.buffers[name][ended] = 0

    def get_state(self):
        """All that the future depends on, as a dict of arrays, num_envs first."""
        _check_open(self)
        return {name: array.copy() for name, array in self._future().items()}

    def set_state(self, state):
        """Go back to what `get_state` returned; returns (observations, infos) as `reset` does."""
        _check_open(self)
        arrays = self._future()
        for name, given in _valid_state(state, arrays, self.num_envs).items():
            arrays[name][...] = given
        self.started = True
        observed = self._observed()
        self.buffers["terminations"][...] = arrays.get("ended", False)
        return observed

    def _future(self):
        arrays = self.state._asdict()
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            arrays["ended"] = self._ended()
        return arrays

    def _ended(self):
        """(num_envs,), whether an episode ended in the last step."""
        return self.buffers["terminations"] | self.buffers["truncations"]

    def _observed(self):
        self.observe()
        self.buffers["terminations"][...] = False
        self.buffers["truncations"][...] = False
        infos = {name: self.buffers[name].copy() for name in self.info_names}
        return self.buffers["observations"].copy(), infos

    def render(self):
        """One (height, width, 3) uint8 picture per environment; "human" shows the first one in a window instead."""
        _check_open(self)
        if self.render_mode is None:
            raise ValueError("render_mode is None: give 'rgb_array' or 'human' to make_vec")
        if self.render_mode == "rgb_array":
            return tuple(self.draw(env) for env in range(self.num_envs))
        import pygame

        picture = self.draw(0)
        if self.window is None:
            pygame.init()
            self.window = pygame.display.set_mode(picture.shape[1::-1])
            self.clock = pygame.time.Clock()
        pygame.event.pump()
        pygame.surfarray.blit_array(self.window, picture.swapaxes(0, 1))
        pygame.display.flip()
        self.clock.tick(self.metadata["render_fps"])  # waits: this is to be watched
        return None

    def close_extras(self, **kwargs):
        if self.window is not None:
            import pygame

            pygame.quit()
            self.window = None


# ----------------------------------------------------------------------------------------------------------------------
# Randomness
# ----------------------------------------------------------------------------------------------------------------------
# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with a key and a counter per environment: the n-th number of an
# environment is a hash of (seed, environment index, n), whichever process draws it. rng (num_envs, 2) holds the keys
# and the counters, as int64 because tensors of uint64 cannot be pickled.

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@kernel
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def _seed_rng(rng, seeds, index):
    for env in range(rng.shape[0]):
        rng[env, 0] = np.int64(_mix(_mix(seeds[env] + GOLDEN) + np.uint64(index[env]) * GOLDEN))
        rng[env, 1] = 0


@kernel
def _uniform(rng, env, low, high):
    """The environment's next number, uniform in [low, high)."""
    rng[env, 1] += 1
    bits = _mix(np.uint64(rng[env, 0]) + np.uint64(rng[env, 1]) * GOLDEN) >> np.uint64(11)
    return low + (high - low) * (np.float64(bits) * 2.0**-53)


# ----------------------------------------------------------------------------------------------------------------------
# Grid
# ----------------------------------------------------------------------------------------------------------------------
# A square divided into cells x cells: whatever is near a point is in its cell or in one of the eight around it.


def _cells_along(side, reach, count):
    """How many cells along a side: each wider than `reach`, about one for each point; 1 where a grid saves nothing."""
    cells = min(int(side / reach * (1.0 - 1e-9)), math.ceil(math.sqrt(count)))
    return cells if cells > 3 else 1


@kernel
def _cell(x, cells, side):
    """The row or column that a coordinate lies in; the first or the last if it is outside."""
    return min(max(int(x * (cells / side)), 0), cells - 1)


@kernel
def _around(a, cells):
    """The row or column a, where -1 and `cells` are the last and the first: the grid goes round a periodic box."""
    if a < 0:
        return cells - 1
    return a if a < cells else 0


@kernel
def _sort_into_cells(points, cells, side, order, start):
    """Counting sort of points (n, 2 or more) by grid cell: cell c holds order[start[c] : start[c + 1]]."""
    start[:] = 0
    if cells == 1:  # as with few agents: there is nothing to sort
        start[1] = points.shape[0]
        for i in range(points.shape[0]):
            order[i] = i
        return
    for i in range(points.shape[0]):
        start[_cell(points[i, 0], cells, side) * cells + _cell(points[i, 1], cells, side)] += 1
    for c in range(1, start.shape[0]):
        start[c] += start[c - 1]
    for i in range(points.shape[0] - 1, -1, -1):
        c = _cell(points[i, 0], cells, side) * cells + _cell(points[i, 1], cells, side)
        start[c] -= 1
        order[start[c]] = i


# ----------------------------------------------------------------------------------------------------------------------
# Neighbors
# ----------------------------------------------------------------------------------------------------------------------
# With `n_neighbors`, an agent's observation begins with a block of features for each of its nearest others, nearest
# first, zeros for an absent one. `infos["neighbors"]` says who they are, so that policies can send them messages.

NEIGHBOR_FEATURES = 8  # forward, left, cos and sin of the heading, direction (forward, left), spacing, presence
NEIGHBOR_LOW = (-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.0)  # the smallest value of each; the largest is 1
NEIGHBOR_SPACING = 0.1  # distance at which the observed spacing is 0 [radius]
NEIGHBOR_NEAR = 0.05  # distance within which an observed direction fades [radius]


@inlined
def _insert_neighbor(distance, other, nearest, neighbors):
    """Enter another agent among the nearest so far, if it is one: by selection, because branches would mispredict."""
    for k in range(nearest.shape[0]):
        closer = distance < nearest[k]
        last = nearest[k]
        last_other = neighbors[k]
        nearest[k] = distance if closer else last
        neighbors[k] = other if closer else last_other
        distance = last if closer else distance
        other = last_other if closer else other


@kernel
def _find_neighbors(env, position, reach, cells, side, order, start, nearest, neighbors):
    """Who is nearest to whom within `reach`, in a plane that is not periodic; where one is absent, the agent itself.

    Each cell is at least `reach` wide; those at the edge of the square also hold what is beyond it.
    """
    n_agents, n_neighbors = neighbors.shape[1:]
    _sort_into_cells(position[env], cells, side, order, start)
    for m in range(n_agents):  # in the order of the grid, so that what is near in the plane is near in the cache
        i = order[m]
        x, y = position[env, i, 0], position[env, i, 1]
        for k in range(n_neighbors):
            nearest[k] = reach * reach
            neighbors[env, i, k] = i
        row, column = _cell(x, cells, side), _cell(y, cells, side)
        for a in range(max(row - 1, 0), min(row + 2, cells)):
            begin = start[a * cells + max(column - 1, 0)]  # neighbouring cells of a row follow one another
            end = start[a * cells + min(column + 1, cells - 1) + 1]
            for other in range(begin, end):
                j = order[other]
                dx, dy = position[env, j, 0] - x, position[env, j, 1] - y
                squared = dx * dx + dy * dy
                if squared < nearest[n_neighbors - 1] and j != i:
                    _insert_neighbor(squared, j, nearest, neighbors[env, i])


@inlined
def _observe_offset(forward, left, features):
    """An offset [radii] at the scale of what is near: its direction, which fades close to 0, and the spacing."""
    distance = math.sqrt(forward * forward + left * left)
    features[0] = forward / (distance + NEIGHBOR_NEAR)
    features[1] = left / (distance + NEIGHBOR_NEAR)
    features[2] = (distance - NEIGHBOR_SPACING) / (distance + NEIGHBOR_SPACING)


@inlined
def _observe_neighbor(forward, left, cos, sin, features):
    """A neighbour that is present: its offset [radii], cos and sin of its heading (or what an agent has instead)."""
    features[0] = forward
    features[1] = left
    features[2] = cos
    features[3] = sin
    _observe_offset(features[0], features[1], features[4:7])
    features[7] = 1.0


def _draw_links(surface, position, neighbors):
    """Thin lines from every agent (pixels) to its neighbours."""
    import pygame

    for i, others in enumerate(neighbors):
        for j in others[others != i]:
            pygame.draw.line(surface, (190, 215, 255), position[i].tolist(), position[j].tolist(), 2)


# ----------------------------------------------------------------------------------------------------------------------
# Swarm
# ----------------------------------------------------------------------------------------------------------------------

SWARM_AGENT_DIAMETER = 0.1  # two agents nearer than this collide [length]
SWARM_OBSTACLE_RADIUS = 0.5  # [length]
SWARM_PUBLISHED_DENSITY = 0.4  # 40 agents in a box of side 10 [agents per unit area]
SWARM_SPAWN_TRIES = 100  # places tried for each agent
SWARM_PUSH = 2.0  # largest push forward and left, on a heading of length 1: enough to turn back
SWARM_SPACING = NEIGHBOR_SPACING  # distance at which cohesion is greatest [radius]
SWARM_OWN_FEATURES = 12  # turn, crowding, mean of all seen (7, as of a neighbour), obstacle (forward, left, presence)
SWARM_REWARD_TERMS = ("alignment", "cohesion", "separation", "turning", "order", "obstacle", "energy")

# The Morse potential of two agents, lowest 0.4 radii apart. 8 times the square of 0.08 / 0.2 is more than 1, so that
# large swarms take more room instead of collapsing (D'Orsogna et al., PRL 96, 104302 (2006)).
SWARM_REPULSION = 8.0  # [attraction], whose strength is the unit of energy
SWARM_REPULSION_LENGTH = 0.08  # [radius]
SWARM_ATTRACTION_LENGTH = 0.2  # [radius]
SWARM_MORSE_AT_RADIUS = SWARM_REPULSION * math.exp(-1 / SWARM_REPULSION_LENGTH) - math.exp(-1 / SWARM_ATTRACTION_LENGTH)

# Columns of `terms`.
SWARM_ALIGNMENT = 0
SWARM_COHESION = 1
SWARM_SEPARATION = 2
SWARM_TURNING = 3
SWARM_ORDER = 4
SWARM_OBSTACLE = 5
SWARM_ENERGY = 6

# Columns of `totals` and `stats`, in the order of Swarm.stat_names.
SWARM_STAT_RETURN = 0
SWARM_STAT_LENGTH = 1
SWARM_STAT_ORDER = 2
SWARM_STAT_COHESION = 3
SWARM_STAT_COLLISIONS = 4
SWARM_STAT_TERMS = 5  # the first of them, the others follow


class SwarmParams(NamedTuple):
    box_size: float  # side of the periodic box [length]
    radius: float  # how far an agent sees [length]
    speed: float  # [length / time]
    dt: float  # [time]
    max_turn: float  # largest turn in one step [rad]
    by_turn: bool  # whether an action is the turn itself, or a push
    noise: float  # width of the uniform heading noise per step [rad]
    max_steps: int
    count_self: bool
    cells: int  # grid cells along a side, each at least `radius` wide
    obstacle_cells: int  # the same for obstacles, each at least `radius + SWARM_OBSTACLE_RADIUS` wide
    weights: np.ndarray  # (7,), one per reward term


class SwarmState(NamedTuple):
    position: np.ndarray  # (num_envs, n_agents, 2), in [0, box_size)
    direction: np.ndarray  # (num_envs, n_agents, 2), cos and sin of the heading
    turn: np.ndarray  # (num_envs, n_agents), the last one commanded [rad]
    obstacle: np.ndarray  # (num_envs, n_obstacles, 2), centres, in [0, box_size)
    elapsed: np.ndarray  # (num_envs,), steps since the reset
    totals: np.ndarray  # (num_envs, len(stat_names)), sums over the episode so far
    rng: np.ndarray  # (num_envs, 2)


class SwarmScratch(NamedTuple):
    """Room for one environment's step, used again for the next, so that stepping allocates nothing."""

    terms: np.ndarray  # (n_agents, 7), the reward terms before weighting
    energy: np.ndarray  # (num_envs, n_agents), of every agent before the step, where it has a weight
    pose: np.ndarray  # (n_agents, 4), x, y [box sides], cos and sin of the heading, sorted by grid cell
    seen: np.ndarray  # (n_agents,), rows of `pose` that an agent sees
    offset: np.ndarray  # (n_agents, 2), and where they are from it [box sides]
    nearest: np.ndarray  # (n_neighbors,), distances of an agent's nearest so far
    order: np.ndarray  # (n_agents,), agents sorted by grid cell
    start: np.ndarray  # (cells ** 2 + 1,), where each cell begins in `order`
    obstacle_order: np.ndarray  # (n_obstacles,)
    obstacle_start: np.ndarray  # (obstacle cells ** 2 + 1,)


@kernel
def _offset(delta, box_size):
    """The shortest way round a periodic box (the minimum image)."""
    return delta - box_size * np.rint(delta / box_size)


@kernel
def _wrap(x, box_size):
    x -= np.floor(x / box_size) * box_size
    return x if x < box_size else 0.0  # a tiny negative x rounds up to box_size


@kernel
def _nearest_obstacle(x, y, reach, obstacle, box_size, cells, order, start):
    """Distance and offset to the nearest obstacle's centre; infinity if none is within `reach`."""
    nearest = reach * reach
    nearest_dx, nearest_dy = math.inf, math.inf
    span = 1 if cells > 1 else 0
    row, column = _cell(x, cells, box_size), _cell(y, cells, box_size)
    for a in range(row - span, row + span + 1):
        for b in range(column - span, column + span + 1):
            c = _around(a, cells) * cells + _around(b, cells)
            for m in range(start[c], start[c + 1]):
                k = order[m]
                dx, dy = _offset(obstacle[k, 0] - x, box_size), _offset(obstacle[k, 1] - y, box_size)
                if dx * dx + dy * dy <= nearest:
                    nearest = dx * dx + dy * dy
                    nearest_dx, nearest_dy = dx, dy
    return math.hypot(nearest_dx, nearest_dy), nearest_dx, nearest_dy


@kernel
def _swarm_reset(env, draw_obstacles, params, state):
    """A new episode: obstacles, positions and headings uniformly at random, no agent inside an obstacle."""
    position = state.position[env]
    direction = state.direction[env]
    obstacle = state.obstacle[env]
    rng = state.rng
    if draw_obstacles:
        for k in range(obstacle.shape[0]):
            obstacle[k, 0] = _uniform(rng, env, 0.0, params.box_size)
            obstacle[k, 1] = _uniform(rng, env, 0.0, params.box_size)
    for i in range(position.shape[0]):
        for _ in range(SWARM_SPAWN_TRIES):  # in a box too full for this, the first step pushes the agent out
            position[i, 0] = _uniform(rng, env, 0.0, params.box_size)
            position[i, 1] = _uniform(rng, env, 0.0, params.box_size)
            free = True
            for k in range(obstacle.shape[0]):
                dx = _offset(position[i, 0] - obstacle[k, 0], params.box_size)
                dy = _offset(position[i, 1] - obstacle[k, 1], params.box_size)
                free = free and dx * dx + dy * dy > SWARM_OBSTACLE_RADIUS**2
            if free:
                break
        heading = _uniform(rng, env, -math.pi, math.pi)
        direction[i, 0], direction[i, 1] = math.cos(heading), math.sin(heading)
    state.turn[env] = 0.0
    state.elapsed[env] = 0
    state.totals[env] = 0.0


@inlined
def _swarm_move(env, actions, params, state, scratch):
    """Turn, then go straight for `dt`; an agent that ends inside an obstacle is put back on its edge."""
    position = state.position[env]
    direction = state.direction[env]
    obstacle = state.obstacle[env]
    terms = scratch.terms
    box_size = params.box_size
    step = params.speed * params.dt
    cells = params.obstacle_cells
    order = scratch.obstacle_order
    start = scratch.obstacle_start
    _sort_into_cells(obstacle, cells, box_size, order, start)

    for i in range(position.shape[0]):
        # Turn
        if params.by_turn:
            turn = np.float64(actions[env, i, 0])
        else:
            forward = min(max(np.float64(actions[env, i, 0]), -1.0), 1.0)
            left = min(max(np.float64(actions[env, i, 1]), -1.0), 1.0)
            turn = math.atan2(SWARM_PUSH * left, 1.0 + SWARM_PUSH * forward)
        turn = min(max(turn, -params.max_turn), params.max_turn)
        state.turn[env, i] = turn
        if params.noise > 0.0:
            turn += _uniform(state.rng, env, -0.5 * params.noise, 0.5 * params.noise)
        cos, sin = math.cos(turn), math.sin(turn)
        cos, sin = cos * direction[i, 0] - sin * direction[i, 1], sin * direction[i, 0] + cos * direction[i, 1]
        norm = math.sqrt(cos * cos + sin * sin)  # keeps rounding from adding up over an episode
        direction[i, 0], direction[i, 1] = cos / norm, sin / norm
        terms[i, SWARM_TURNING] = -abs(state.turn[env, i])

        # Straight ahead
        x = _wrap(position[i, 0] + step * direction[i, 0], box_size)
        y = _wrap(position[i, 1] + step * direction[i, 1], box_size)

        # Out of the nearest obstacle
        terms[i, SWARM_OBSTACLE] = 0.0
        if obstacle.shape[0] > 0:
            distance, dx, dy = _nearest_obstacle(x, y, SWARM_OBSTACLE_RADIUS, obstacle, box_size, cells, order, start)
            if distance < 1e-9:  # on the very centre: back the way it came
                distance = 1e-9
                dx, dy = 1e-9 * direction[i, 0], 1e-9 * direction[i, 1]
            if distance < SWARM_OBSTACLE_RADIUS:
                terms[i, SWARM_OBSTACLE] = -1.0
                edge = 1.0 - SWARM_OBSTACLE_RADIUS / distance
                x, y = _wrap(x + edge * dx, box_size), _wrap(y + edge * dy, box_size)
        position[i, 0], position[i, 1] = x, y


@kernel
def _closeness(distance, radius):
    """The published cohesion of one neighbour: a bell around a tenth of the radius."""
    return math.exp(-((distance - SWARM_SPACING * radius) ** 2) / (2.0 * (0.2 * radius) ** 2))


@kernel
def _morse(distance):
    """The potential of two agents at a distance [radii], shifted to be 0 at the radius, where they lose sight."""
    repulsion = SWARM_REPULSION * math.exp(-distance / SWARM_REPULSION_LENGTH)
    return repulsion - math.exp(-distance / SWARM_ATTRACTION_LENGTH) - SWARM_MORSE_AT_RADIUS


@inlined
def _swarm_observe(env, params, state, scratch, outputs):
    """What every agent sees, its neighbours' indices, and the reward terms that depend on neighbours."""
    position = state.position[env]
    direction = state.direction[env]
    obstacle = state.obstacle[env]
    observations = outputs.observations[env]
    neighbors = outputs.neighbors[env]
    terms = scratch.terms
    pose = scratch.pose
    seen = scratch.seen
    offset = scratch.offset
    nearest = scratch.nearest
    order = scratch.order
    start = scratch.start
    n_agents, n_neighbors = neighbors.shape
    box_size = params.box_size
    radius = params.radius
    cells = params.cells
    span = 1 if cells > 1 else 0
    own = n_neighbors * NEIGHBOR_FEATURES  # where an agent's own features begin
    limit = (radius / box_size) ** 2

    # Poses in the order of the grid, so that what is near in the box is near in memory
    _sort_into_cells(position, cells, box_size, order, start)
    for m in range(n_agents):
        i = order[m]
        pose[m, 0], pose[m, 1] = position[i, 0] / box_size, position[i, 1] / box_size
        pose[m, 2], pose[m, 3] = direction[i, 0], direction[i, 1]

    for m in range(n_agents):
        i = order[m]
        x, y = pose[m, 0], pose[m, 1]
        cos, sin = pose[m, 2], pose[m, 3]

        # All within the radius
        n_seen = 0
        row, column = _cell(x, cells, 1.0), _cell(y, cells, 1.0)
        for a in range(row - span, row + span + 1):
            for b in range(column - span, column + span + 1):
                c = _around(a, cells) * cells + _around(b, cells)
                for other in range(start[c], start[c + 1]):  # keep or overwrite: a branch would mispredict
                    dx, dy = pose[other, 0] - x, pose[other, 1] - y
                    dx, dy = dx - np.rint(dx), dy - np.rint(dy)
                    seen[n_seen] = other
                    offset[n_seen, 0], offset[n_seen, 1] = dx, dy
                    n_seen += (dx * dx + dy * dy <= limit) & (other != m)

        # Their sums, and the nearest of them, as rows of `pose`
        for k in range(n_neighbors):
            nearest[k] = math.inf
        collisions = 0
        cohesion = 0.0
        sum_dx = sum_dy = 0.0
        sum_cos = sum_sin = 0.0
        for s in range(n_seen):
            other = seen[s]
            dx, dy = offset[s, 0], offset[s, 1]
            distance = box_size * math.sqrt(dx * dx + dy * dy)
            collisions += distance < SWARM_AGENT_DIAMETER
            cohesion += _closeness(distance, radius)
            sum_dx, sum_dy = sum_dx + dx, sum_dy + dy
            sum_cos, sum_sin = sum_cos + pose[other, 2], sum_sin + pose[other, 3]
            _insert_neighbor(distance, other, nearest, neighbors[i])

        # Neighbours, in the agent's own frame
        for feature in range(own + SWARM_OWN_FEATURES):
            observations[i, feature] = 0.0
        kept = min(n_seen, n_neighbors)
        for k in range(kept):
            other = neighbors[i, k]
            feature = k * NEIGHBOR_FEATURES
            dx, dy = pose[other, 0] - x, pose[other, 1] - y
            dx, dy = box_size / radius * (dx - np.rint(dx)), box_size / radius * (dy - np.rint(dy))
            _observe_neighbor(
                cos * dx + sin * dy,
                cos * dy - sin * dx,
                cos * pose[other, 2] + sin * pose[other, 3],
                cos * pose[other, 3] - sin * pose[other, 2],
                observations[i, feature : feature + NEIGHBOR_FEATURES],
            )
            neighbors[i, k] = order[other]
        for k in range(kept, n_neighbors):
            neighbors[i, k] = i

        # Own turn, crowding, and the mean of all within the radius
        share = 1.0 / max(n_seen, 1)
        observations[i, own] = state.turn[env, i] / params.max_turn
        observations[i, own + 1] = n_seen / (n_seen + n_neighbors)
        observations[i, own + 2] = share * box_size / radius * (cos * sum_dx + sin * sum_dy)
        observations[i, own + 3] = share * box_size / radius * (cos * sum_dy - sin * sum_dx)
        observations[i, own + 4] = share * (cos * sum_cos + sin * sum_sin)
        observations[i, own + 5] = share * (cos * sum_sin - sin * sum_cos)
        if n_seen > 0:
            _observe_offset(observations[i, own + 2], observations[i, own + 3], observations[i, own + 6 : own + 9])

        # Reward terms
        terms[i, SWARM_ALIGNMENT] = share * (cos * sum_cos + sin * sum_sin)
        terms[i, SWARM_SEPARATION] = -collisions
        if params.weights[SWARM_ENERGY] != 0.0:
            energy = 0.0
            for s in range(n_seen):
                energy += _morse(box_size / radius * math.sqrt(offset[s, 0] ** 2 + offset[s, 1] ** 2))
            terms[i, SWARM_ENERGY] = scratch.energy[env, i] - energy
            scratch.energy[env, i] = energy
        if params.count_self:
            cohesion += _closeness(0.0, radius)
            n_seen += 1
        terms[i, SWARM_COHESION] = cohesion / max(n_seen, 1)

    # The nearest obstacle
    if obstacle.shape[0] > 0:
        reach = radius + SWARM_OBSTACLE_RADIUS
        cells = params.obstacle_cells
        order = scratch.obstacle_order
        start = scratch.obstacle_start
        _sort_into_cells(obstacle, cells, box_size, order, start)
        for i in range(n_agents):
            x, y = position[i, 0], position[i, 1]
            cos, sin = direction[i, 0], direction[i, 1]
            distance, dx, dy = _nearest_obstacle(x, y, reach, obstacle, box_size, cells, order, start)
            if distance < math.inf:
                observations[i, own + 9] = (cos * dx + sin * dy) / reach
                observations[i, own + 10] = (cos * dy - sin * dx) / reach
                observations[i, own + 11] = 1.0


@inlined
def _swarm_reward(env, params, state, scratch, outputs):
    """Rewards and statistics of the step, from the reward terms and the poses that `_swarm_observe` leaves."""
    pose = scratch.pose
    order = scratch.order
    terms = scratch.terms
    rewards = outputs.rewards
    weights = params.weights
    totals = state.totals
    n_agents = scratch.pose.shape[0]

    # Order: the mean heading vector, and each agent's heading along it
    mean_x = mean_y = 0.0
    for m in range(n_agents):
        mean_x, mean_y = mean_x + pose[m, 2] / n_agents, mean_y + pose[m, 3] / n_agents
    polar_order = math.hypot(mean_x, mean_y)
    for m in range(n_agents):
        terms[order[m], SWARM_ORDER] = (pose[m, 2] * mean_x + pose[m, 3] * mean_y) / max(polar_order, 1e-9)

    # Rewards
    for i in range(n_agents):
        rewards[env, i] = 0.0
    for t in range(len(SWARM_REWARD_TERMS)):
        total = 0.0
        for i in range(n_agents):
            rewards[env, i] += weights[t] * terms[i, t]
            total += weights[t] * terms[i, t]
        totals[env, SWARM_STAT_TERMS + t] += total / n_agents
        totals[env, SWARM_STAT_RETURN] += total / n_agents

    # Statistics
    cohesion = 0.0
    collisions = 0.0
    for i in range(n_agents):
        cohesion += terms[i, SWARM_COHESION]
        collisions -= terms[i, SWARM_SEPARATION]
    totals[env, SWARM_STAT_LENGTH] += 1.0
    totals[env, SWARM_STAT_ORDER] += polar_order
    totals[env, SWARM_STAT_COHESION] += cohesion / n_agents
    totals[env, SWARM_STAT_COLLISIONS] += collisions / n_agents


@kernel
def _swarm_step(actions, params, state, scratch, outputs):
    for env in range(actions.shape[0]):
        _swarm_move(env, actions, params, state, scratch)
        _swarm_observe(env, params, state, scratch, outputs)
        _swarm_reward(env, params, state, scratch, outputs)
        state.elapsed[env] += 1
        outputs.truncations[env] = state.elapsed[env] >= params.max_steps
        if outputs.truncations[env]:
            outputs.final_observations[env] = outputs.observations[env]
            outputs.final_neighbors[env] = outputs.neighbors[env]
            outputs.stats[env] = state.totals[env]
            for column in (SWARM_STAT_ORDER, SWARM_STAT_COHESION, SWARM_STAT_COLLISIONS):  # means over the steps
                outputs.stats[env, column] /= state.totals[env, SWARM_STAT_LENGTH]
            _swarm_reset(env, True, params, state)
            _swarm_observe(env, params, state, scratch, outputs)


def _images(points, reach, box_size):
    """The points (n, 2) with those copies of them that reach into the box from the other side of its edges."""
    shifts = np.array([(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]) * box_size
    images = (points[:, None] + shifts).reshape(-1, 2)
    return images[((images > -reach) & (images < box_size + reach)).all(axis=1)]


class Swarm(NativeVectorEnv):
    """Self-propelled agents at constant speed in a periodic box, after Vicsek et al., PRL 75, 1226 (1995).

    Unlike there, an agent moves along its new heading, not the old. "Published" is Equivariant RL Swarm (see README).

    Action (num_envs, n_agents, 2): a push forward and left, each in [-1, 1]; the agent turns to where its heading
    plus SWARM_PUSH times the push points, but at most by max_turn; then one step straight ahead. With steering="turn",
    as published, (num_envs, n_agents, 1): that turn itself, in [-max_turn, max_turn] rad. Pushes are easier to learn:
    the turn to what is behind jumps from -pi to pi where what it depends on goes on smoothly.

    Observation (num_envs, n_agents, 8 * n_neighbors + 12), in the agent's own frame, so that moving or turning all that
    there is changes nothing:

        8 each    the `n_neighbors` nearest others within `radius`, nearest first: offset o forward and left (in radii),
                  cos and sin of the relative heading, the offset once more at the scale on which the reward turns, as
                  its direction o / (|o| + 0.05) and spacing (|o| - 0.1) / (|o| + 0.1), and 1 for presence; all zeros
                  for an absent one
        1         the last turn (in max_turn)
        1         crowding, n / (n + n_neighbors), of n others within `radius`
        7         offset, cos and sin, as means over all these n, and direction and spacing of the mean offset; without
                  them an agent in a tight crowd would see nothing beyond its nearest neighbours and could not rejoin
                  the rest
        3         the nearest obstacle: its centre forward and left (in radius + SWARM_OBSTACLE_RADIUS), 1 for presence

    `infos["neighbors"]` (num_envs, n_agents, n_neighbors) says who those neighbours are; where one is absent, it has
    the index of the agent itself.

    Reward of an agent: the weighted sum of these terms. The first three depend on the others within `radius` and are 0
    without any; the default weights are the published ones.

        alignment     mean over them of the cos of the relative heading
        cohesion      mean over them of exp(-(d - 0.1 radius)^2 / (2 (0.2 radius)^2)) at distance d
        separation    -1 for each of them nearer than SWARM_AGENT_DIAMETER
        turning       -|turn|, before noise [rad]
        order         cos of the angle between the agent's heading and the mean heading of the swarm
        obstacle      -1 on a step that ended inside an obstacle (the agent is put back on its edge)
        energy        minus the change over the step of the agent's energy: the sum over the others within `radius` of
                      V(d) - V(radius) with the Morse potential V(d) = 8 exp(-d / (0.08 radius)) - exp(-d / (0.2
                      radius)), which is lowest at 0.4 radius

    An agent's energy is 0 without any within `radius`, and does not jump when one comes or goes. Over an episode the
    energy terms add up to the energy at the start less that at the end. A pair counts in the energies of both.

    With `count_self` the agent counts in its own cohesion, at distance 0, as it does in the published reward.

    Episodes end only at `max_steps`, by truncation. Episode statistics:

        r, l             return, mean over agents, and length
        polar_order      |mean heading vector|, mean over steps
        cohesion         the reward term before weighting, mean over agents and steps
        collisions       others nearer than SWARM_AGENT_DIAMETER, mean over agents and steps
        reward_<term>    the weighted reward terms, means over agents; they add up to r

    `reset(options={"position": (num_envs, n_agents, 2), "heading": (num_envs, n_agents), "obstacle": (num_envs,
    n_obstacles, 2)})` gives any part of the start, wrapped into the box; the episodes after it start at random again.
    `box_size` None keeps the published density, 40 agents to 10 x 10.
    """

    info_names = ("neighbors",)
    stat_names = ("r", "l", "polar_order", "cohesion", "collisions", *(f"reward_{term}" for term in SWARM_REWARD_TERMS))

    def __init__(
        self,
        num_envs=1,
        n_agents=10,
        box_size=None,
        radius=1.5,
        speed=1.0,
        dt=0.2,
        max_turn=math.pi,
        steering="push",
        noise=0.0,
        n_neighbors=6,
        n_obstacles=0,
        max_steps=250,
        alignment_weight=0.0,
        cohesion_weight=0.4,
        separation_weight=0.0,
        turning_weight=0.01,
        order_weight=0.6,
        obstacle_weight=1.0,
        energy_weight=0.0,
        count_self=False,
        render_mode=None,
        first_env=0,
    ):
        n_agents = _integer("n_agents", n_agents, 1, LARGEST_SIZE)
        n_neighbors = _integer("n_neighbors", n_neighbors, 1, LARGEST_SIZE)
        n_obstacles = _integer("n_obstacles", n_obstacles, 0, LARGEST_SIZE)
        if box_size is None:
            box_size = max(math.sqrt(n_agents / SWARM_PUBLISHED_DENSITY), 2.0 * _number("radius", radius))
        box_size = _number("box_size", box_size, 1e-6)
        if n_obstacles * math.pi * SWARM_OBSTACLE_RADIUS**2 > 0.5 * box_size**2:
            most = int(0.5 * box_size**2 / (math.pi * SWARM_OBSTACLE_RADIUS**2))
            raise ValueError(f"n_obstacles is {n_obstacles}: at most {most} fill half of a box of side {box_size:g}")
        if steering not in ("push", "turn"):
            raise ValueError(f"steering is {steering!r}: it must be 'push' or 'turn'")
        if not isinstance(count_self, bool):
            raise ValueError(f"count_self is {count_self!r}: it must be True or False")
        weights = dict(
            alignment_weight=alignment_weight,
            cohesion_weight=cohesion_weight,
            separation_weight=separation_weight,
            turning_weight=turning_weight,
            order_weight=order_weight,
            obstacle_weight=obstacle_weight,
            energy_weight=energy_weight,
        )
        self.params = SwarmParams(
            box_size=box_size,
            radius=_number("radius", radius, SWARM_AGENT_DIAMETER, 0.5 * box_size),
            speed=_number("speed", speed, 0.0),
            dt=_number("dt", dt, 1e-6),
            max_turn=_number("max_turn", max_turn, 1e-6, math.pi),
            by_turn=steering == "turn",
            noise=_number("noise", noise, 0.0, 2.0 * math.pi),
            max_steps=_integer("max_steps", max_steps, 1),
            count_self=count_self,
            cells=_cells_along(box_size, radius, n_agents),
            obstacle_cells=_cells_along(box_size, radius + SWARM_OBSTACLE_RADIUS, n_obstacles),
            weights=np.array([_number(name, weight) for name, weight in weights.items()]),
        )
        self.max_steps = self.params.max_steps
        own_low = [-1, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0]
        low = np.float32([*NEIGHBOR_LOW * n_neighbors, *own_low])
        turns = gym.spaces.Box(-self.params.max_turn, self.params.max_turn, (n_agents, 1), np.float32)
        pushes = gym.spaces.Box(-1.0, 1.0, (n_agents, 2), np.float32)
        super().__init__(
            num_envs,
            gym.spaces.Box(np.tile(low, (n_agents, 1)), 1.0, dtype=np.float32),
            turns if self.params.by_turn else pushes,
            render_mode,
            first_env,
        )
        self.start_shapes = {
            "position": (num_envs, n_agents, 2),
            "heading": (num_envs, n_agents),
            "obstacle": (num_envs, n_obstacles, 2),
        }
        self.buffers["neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        self.buffers["final_neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        self.state = SwarmState(
            position=np.zeros((num_envs, n_agents, 2)),
            direction=np.zeros((num_envs, n_agents, 2)),
            turn=np.zeros((num_envs, n_agents)),
            obstacle=np.zeros((num_envs, n_obstacles, 2)),
            elapsed=np.zeros(num_envs, np.int64),
            totals=np.zeros((num_envs, len(self.stat_names))),
            rng=np.zeros((num_envs, 2), np.int64),
        )
        self.scratch = SwarmScratch(
            terms=np.zeros((n_agents, len(SWARM_REWARD_TERMS))),
            energy=np.zeros((num_envs, n_agents)),
            pose=np.zeros((n_agents, 4)),
            seen=np.zeros(n_agents, np.int64),
            offset=np.zeros((n_agents, 2)),
            nearest=np.zeros(n_neighbors),
            order=np.zeros(n_agents, np.int64),
            start=np.zeros(self.params.cells**2 + 1, np.int64),
            obstacle_order=np.zeros(n_obstacles, np.int64),
            obstacle_start=np.zeros(self.params.obstacle_cells**2 + 1, np.int64),
        )

    def restart(self, start):
        box_size = self.params.box_size
        if "obstacle" in start:
            self.state.obstacle[...] = start["obstacle"] % box_size
        for env in range(self.num_envs):
            _swarm_reset(env, "obstacle" not in start, self.params, self.state)
        if "position" in start:
            self.state.position[...] = start["position"] % box_size
        if "heading" in start:
            self.state.direction[...] = np.stack([np.cos(start["heading"]), np.sin(start["heading"])], axis=-1)

    def observe(self):
        for env in range(self.num_envs):
            _swarm_observe(env, self.params, self.state, self.scratch, Outputs(**self.buffers))

    def advance(self, actions):
        _swarm_step(actions, self.params, self.state, self.scratch, Outputs(**self.buffers))

    def draw(self, env, size=384):
        """Agents as arrowheads coloured by heading, obstacles as grey discs; size x size pixels."""
        import pygame

        scale = 2 * size / self.params.box_size  # drawn at twice the size, then smoothed
        surface = pygame.Surface((2 * size, 2 * size))
        surface.fill("white")
        for x, y in _images(self.state.obstacle[env], SWARM_OBSTACLE_RADIUS, self.params.box_size):
            pygame.draw.circle(surface, "gray70", (scale * x, scale * y), scale * SWARM_OBSTACLE_RADIUS)
        length = max(0.12 * scale, 5.0)
        arrow = np.array([[1.2, 0.0], [-0.8, 0.6], [-0.4, 0.0], [-0.8, -0.6]]) * length
        for (x, y), (cos, sin) in zip(self.state.position[env], self.state.direction[env], strict=True):
            color = pygame.Color(0)
            color.hsva = (math.degrees(math.atan2(sin, cos)) % 360.0, 85, 80, 100)
            corners = arrow @ np.array([[cos, sin], [-sin, cos]]) + (scale * x, scale * y)
            pygame.draw.polygon(surface, color, corners.tolist())
        surface = pygame.transform.flip(pygame.transform.smoothscale(surface, (size, size)), False, True)  # y is up
        return pygame.surfarray.array3d(surface).swapaxes(0, 1).copy()


def vicsek_policy(envs, radius=None, noise=0.0, seed=0):
    """Vicsek et al. (1995): turn to the mean heading of oneself and the neighbours within `radius` (None: all seen).

    noise is the width of the uniform error added to each turn [rad].
    """
    rng = np.random.default_rng(seed)
    params = envs.params
    reach = 1.0 if radius is None else radius / params.radius

    def act(observations, infos):
        features = observations[..., :-SWARM_OWN_FEATURES]  # (num_envs, n_agents, n_neighbors * NEIGHBOR_FEATURES)
        seen = features.reshape(*features.shape[:2], -1, NEIGHBOR_FEATURES)
        forward, left, cos, sin, _, _, _, present = np.moveaxis(seen, -1, 0)
        counted = present * (np.hypot(forward, left) <= reach)  # (num_envs, n_agents, n_neighbors)
        turn = np.arctan2((counted * sin).sum(-1), 1.0 + (counted * cos).sum(-1))
        turn += rng.uniform(-0.5 * noise, 0.5 * noise, turn.shape)
        return _swarm_actions(turn, params)

    return act


def boids_policy(envs, own=0.1, align=0.25, cohesion=12.0, keep=0.1):
    """Reynolds (SIGGRAPH 1987), without separation: turn to own heading + align * mean heading + cohesion * pull.

    The means are over all within the radius; the pull is the part of their mean offset that is longer than `keep`
    [radii]. The defaults are the best for 10 agents of the grid in benchmarks/swarm_learning.py.
    """
    params = envs.params

    def act(observations, infos):
        mean = observations[..., 2 - SWARM_OWN_FEATURES :]  # (num_envs, n_agents, ...), of all seen
        offset = mean[..., 0:2]
        distance = np.linalg.norm(offset, axis=-1, keepdims=True)
        pull = np.maximum(distance - keep, 0.0) * offset / np.maximum(distance, 1e-9)
        forward, left = np.moveaxis(own * np.array([1.0, 0.0]) + align * mean[..., 2:4] + cohesion * pull, -1, 0)
        return _swarm_actions(np.arctan2(left, forward), params)

    return act


def morse_policy(envs, align=1.0, gain=1.0):
    """Down the gradient of the energy: turn to own heading + align * mean heading + gain * force.

    The force is minus the gradient of the Morse potential, summed over the neighbours that are observed one by one
    [attraction / radius]; the mean heading is that of all within the radius. Without `align`, agents of constant speed
    would only circle each other.
    """
    params = envs.params

    def act(observations, infos):
        mean_heading = observations[..., 4 - SWARM_OWN_FEATURES : 6 - SWARM_OWN_FEATURES]  # (num_envs, n_agents, 2)
        features = observations[..., :-SWARM_OWN_FEATURES].astype(float)
        seen = features.reshape(*features.shape[:2], -1, NEIGHBOR_FEATURES)  # (num_envs, n_agents, n_neighbors, ...)
        distance = np.linalg.norm(seen[..., :2], axis=-1, keepdims=True)
        slope = np.exp(-distance / SWARM_ATTRACTION_LENGTH) / SWARM_ATTRACTION_LENGTH
        slope -= SWARM_REPULSION * np.exp(-distance / SWARM_REPULSION_LENGTH) / SWARM_REPULSION_LENGTH
        force = (seen[..., 7:] * slope * seen[..., :2] / np.maximum(distance, 1e-9)).sum(-2)
        forward, left = np.moveaxis(np.array([1.0, 0.0]) + align * mean_heading + gain * force, -1, 0)
        return _swarm_actions(np.arctan2(left, forward), params)

    return act


def _swarm_actions(turn, params):
    """Turns (num_envs, n_agents) [rad] as actions."""
    turn = np.clip(turn, -params.max_turn, params.max_turn)
    actions = turn[..., None] if params.by_turn else np.stack([np.cos(turn) - 1.0, np.sin(turn)], axis=-1) / SWARM_PUSH
    return actions.astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# LidarNavigation
# ----------------------------------------------------------------------------------------------------------------------

LIDAR_DT = 0.05  # length of a step [s]
LIDAR_ROBOT_RADIUS = 0.1  # [m]
LIDAR_AXLE = 0.2  # from wheel to wheel [m]
LIDAR_WHEEL_SPEED = 1.0  # the fastest that a wheel turns [m/s]
LIDAR_LARGEST_COMMAND = 1.2  # to a motor, in LIDAR_WHEEL_SPEED; from 1 on it runs at full speed
LIDAR_WHEEL_LAG = 0.1  # time constant with which a wheel follows its motor [s]
LIDAR_RANGE = 3.0  # [m]
LIDAR_RAYS = 32
LIDAR_OWN_FEATURES = 4  # forward speed, yaw rate, goal (forward, left)
LIDAR_GOAL_RADIUS = 0.25  # a robot whose centre is this near to its goal has arrived [m]
LIDAR_GOAL_DISTANCE = 1.0  # a new goal is at least so far from its robot, where the arena allows [m]
LIDAR_SPAWN_MARGIN = 0.5  # between a spawned robot's centre, or a goal, and the walls [m]
LIDAR_SPAWN_GAP = 0.1  # between a spawned robot, or one that stands on a goal, and everything else [m]
LIDAR_OBSTACLE_RADII = (0.2, 0.5)  # the smallest and the largest [m]
LIDAR_OBSTACLE_GAP = 0.3  # around every obstacle, so that a robot gets through [m]
LIDAR_DOOR = 0.6  # width of a door: two robots pass each other [m]
LIDAR_DOOR_MARGIN = 0.3  # between a door and the corners of its wall, at least [m]
LIDAR_DOOR_SHARE = 0.3  # of the walls that could do without a door
LIDAR_ROOM_SIDE = 1.5  # of a room, at least [m]
LIDAR_MOST_ROOMS = 100
LIDAR_PLACING_TRIES = 1000  # places tried for each robot, goal and obstacle
LIDAR_CONTACT_DEPTH = 1e-4  # discs that overlap by less do not touch: what rounding leaves is no collision [m]
LIDAR_CONTACT_PASSES = 50  # at most
LIDAR_CONTACT_MOMENTUM = 0.8  # share of its last push that a robot goes on with while it still overlaps
LIDAR_REWARD_TERMS = ("progress", "arrival", "collision", "time")

# Columns of `terms`.
LIDAR_PROGRESS = 0
LIDAR_ARRIVAL = 1
LIDAR_COLLISION = 2
LIDAR_TIME = 3

# Columns of `totals` and `stats`, in the order of LidarNavigation.stat_names.
LIDAR_STAT_RETURN = 0
LIDAR_STAT_LENGTH = 1
LIDAR_STAT_GOALS = 2
LIDAR_STAT_COLLISIONS = 3
LIDAR_STAT_COLLISIONS_PER_GOAL = 4
LIDAR_STAT_PATH_EFFICIENCY = 5
LIDAR_STAT_CONTACT = 6
LIDAR_STAT_TERMS = 7  # the first of them, the others follow

# The two ratios cannot be summed up: in their columns, `totals` holds what they are computed from.
LIDAR_SUM_SHORTEST = LIDAR_STAT_COLLISIONS_PER_GOAL  # shortest ways to the goals reached so far [m]
LIDAR_SUM_DRIVEN = LIDAR_STAT_PATH_EFFICIENCY  # ways driven to them [m]

# A wheel's gap to the speed that its motor asks for shrinks as exp(-t / LIDAR_WHEEL_LAG): the share that is left at the
# end of a step, its mean during the step, and the twofold integral over the step of its excess over this mean [s^2].
LIDAR_GAP_LEFT = math.exp(-LIDAR_DT / LIDAR_WHEEL_LAG)
LIDAR_GAP_MEAN = LIDAR_WHEEL_LAG / LIDAR_DT * (1.0 - LIDAR_GAP_LEFT)
LIDAR_GAP_BEND = LIDAR_WHEEL_LAG * LIDAR_DT * (1.0 - LIDAR_GAP_MEAN) - 0.5 * LIDAR_GAP_MEAN * LIDAR_DT**2

# Directions of the rays, in the robot's own frame.
LIDAR_COS = np.cos(np.arange(LIDAR_RAYS) * (2.0 * math.pi / LIDAR_RAYS)).astype(np.float32)
LIDAR_SIN = np.sin(np.arange(LIDAR_RAYS) * (2.0 * math.pi / LIDAR_RAYS)).astype(np.float32)


class LidarParams(NamedTuple):
    width: float  # of the arena, along x [m]
    height: float  # along y [m]
    columns: int  # of rooms, along x; 1 x 1 has no inner walls
    rows: int  # along y
    room_width: float  # [m]
    room_height: float  # [m]
    max_steps: int
    goal_visible_steps: int
    side: float  # of the square that the cell grids divide: the longer side of the arena [m]
    lidar_cells: int  # grid cells along it, each at least a lidar's range and the largest radius wide
    contact_cells: int  # the same for contacts, each at least as wide as two touching discs are apart
    radio_cells: int  # the same for radios, each at least their range wide
    radio_range: float  # [m]
    weights: np.ndarray  # (4,), one per reward term


class LidarState(NamedTuple):
    position: np.ndarray  # (num_envs, n_agents, 2), within the walls [m]
    direction: np.ndarray  # (num_envs, n_agents, 2), cos and sin of the heading
    wheel: np.ndarray  # (num_envs, n_agents, 2), speed of the left and the right one [m/s]
    contact: np.ndarray  # (num_envs, n_agents), whether the last step ended a robot's way at something
    goal: np.ndarray  # (num_envs, n_agents, 2) [m]
    goal_age: np.ndarray  # (num_envs, n_agents), steps since the goal was set
    shortest: np.ndarray  # (num_envs, n_agents), way from where the goal was set to the edge of its circle [m]
    driven: np.ndarray  # (num_envs, n_agents), way driven since then [m]
    obstacle: np.ndarray  # (num_envs, n_obstacles, 3), x, y and radius [m]
    door: np.ndarray  # (num_envs, n_walls, 2), along each inner wall, from where to where; 0, 0 without one [m]
    elapsed: np.ndarray  # (num_envs,), steps since the reset
    totals: np.ndarray  # (num_envs, len(stat_names)), sums over the episode so far
    rng: np.ndarray  # (num_envs, 2)


class LidarScratch(NamedTuple):
    """Room for one environment's step, used again for the next, so that stepping allocates nothing."""

    terms: np.ndarray  # (n_agents, 4), the reward terms before weighting
    disc: np.ndarray  # (n_obstacles + n_agents, 3), x, y and radius: the obstacles, then the robots [m]
    before: np.ndarray  # (n_agents, 2), where the step began [m]
    free: np.ndarray  # (n_agents, 2), where it would have ended without contacts [m]
    speed: np.ndarray  # (n_agents,), mean forward speed during it [m/s]
    push: np.ndarray  # (n_agents, 2), by which one pass moves a robot out of what it overlaps [m]
    touched: np.ndarray  # (n_agents,), whether it overlapped anything
    order: np.ndarray  # (n_obstacles + n_agents,), discs sorted by grid cell
    lidar_start: np.ndarray  # (lidar cells ** 2 + 1,), where each cell begins in `order`
    contact_start: np.ndarray  # (contact cells ** 2 + 1,)
    sorted: np.ndarray  # (n_obstacles + n_agents, 3), `disc` in that order [lidar ranges]
    seen: np.ndarray  # (n_obstacles + n_agents, 3), forward, left and squared radius of what a lidar can hit [ranges]
    radio_order: np.ndarray  # (n_agents,), robots sorted by grid cell
    radio_start: np.ndarray  # (radio cells ** 2 + 1,), where each cell begins there
    nearest: np.ndarray  # (n_neighbors,), squared distances of a robot's nearest so far [m^2]
    reached: np.ndarray  # (n_rooms,), whether the random walk that draws doors has been there
    door_way: np.ndarray  # (num_envs, n_agents, n_walls), from each door to the goal; inf without a door [m]
    way: np.ndarray  # (num_envs, n_agents), from where a robot is to its goal [m]


@inlined
def _wall_right(column, row, params):
    """The index of the wall between a room and the next along x."""
    return row * (params.columns - 1) + column


@inlined
def _wall_above(column, row, params):
    """The index of the wall between a room and the next along y, after all those along x."""
    return params.rows * (params.columns - 1) + row * params.columns + column


@inlined
def _rooms_beside(wall, params):
    """Column and row of the room before a wall, and of the room behind it."""
    n_right = params.rows * (params.columns - 1)
    if wall < n_right:
        column, row = wall % (params.columns - 1), wall // (params.columns - 1)
        return column, row, column + 1, row
    column, row = (wall - n_right) % params.columns, (wall - n_right) // params.columns
    return column, row, column, row + 1


@inlined
def _draw_doors(env, params, state, reached):
    """Doors that connect all rooms: in the walls of a random spanning tree, and in some of the others.

    A random walk through the rooms opens the walls through which it first enters a room. All trees are then equally
    likely (Broder, FOCS 1989; Aldous, SIAM J. Discrete Math. 3, 450 (1990)).
    """
    rng = state.rng
    door = state.door
    columns, rows = params.columns, params.rows
    for wall in range(door.shape[1]):
        door[env, wall, 0], door[env, wall, 1] = 0.0, 0.0
    reached[:] = False
    reached[0] = True
    n_reached = 1
    column = row = 0
    while n_reached < reached.shape[0]:
        way = int(_uniform(rng, env, 0.0, 4.0))  # right, left, up or down
        next_column = column + (way == 0) - (way == 1)
        next_row = row + (way == 2) - (way == 3)
        if not (0 <= next_column < columns and 0 <= next_row < rows):
            continue
        if not reached[next_row * columns + next_column]:
            reached[next_row * columns + next_column] = True
            n_reached += 1
            if way < 2:
                door[env, _wall_right(min(column, next_column), row, params), 1] = LIDAR_DOOR
            else:
                door[env, _wall_above(column, min(row, next_row), params), 1] = LIDAR_DOOR
        column, row = next_column, next_row

    # Some more, and where along the walls all of them are
    for wall in range(door.shape[1]):
        column, row, next_column, _ = _rooms_beside(wall, params)
        if next_column > column:
            length = params.room_height
            corner = row * length
        else:
            length = params.room_width
            corner = column * length
        if door[env, wall, 1] > 0.0 or _uniform(rng, env, 0.0, 1.0) < LIDAR_DOOR_SHARE:
            begin = corner + _uniform(rng, env, LIDAR_DOOR_MARGIN, length - LIDAR_DOOR_MARGIN - LIDAR_DOOR)
            door[env, wall, 0], door[env, wall, 1] = begin, begin + LIDAR_DOOR


@inlined
def _near_wall(x, y, clearance, params):
    """Whether (x, y) is nearer than `clearance` to the line of an inner wall, doors included."""
    column, row = np.rint(x / params.room_width), np.rint(y / params.room_height)
    beside = 0 < column < params.columns and abs(x - column * params.room_width) < clearance
    return beside or (0 < row < params.rows and abs(y - row * params.room_height) < clearance)


@kernel
def _overlaps(x, y, radius, disc, count):
    """Whether a disc at (x, y) overlaps any of the first `count`."""
    overlap = False
    for k in range(count):
        overlap |= (disc[k, 0] - x) ** 2 + (disc[k, 1] - y) ** 2 < (disc[k, 2] + radius) ** 2
    return overlap


@inlined
def _by_door(env, i, across, along, wall, line, door, door_way):
    """The way to the goal of robot i through a wall's door, from a place given across and along the wall at `line`."""
    middle = 0.5 * (door[env, wall, 0] + door[env, wall, 1])
    return math.hypot(line - across, middle - along) + door_way[env, i, wall]


@inlined
def _way_within(env, i, column, row, x, y, params, state, door_way):
    """The shortest way from (x, y), in this room, to the goal of robot i: straight, or by a door; inf without one."""
    door = state.door
    goal_x, goal_y = state.goal[env, i, 0], state.goal[env, i, 1]
    goal_column = _cell(goal_x, params.columns, params.width)
    goal_row = _cell(goal_y, params.rows, params.height)
    way = math.inf
    if column == goal_column and row == goal_row:
        way = math.sqrt((goal_x - x) ** 2 + (goal_y - y) ** 2)
    else:
        if column > 0:
            wall = _wall_right(column - 1, row, params)
            way = min(way, _by_door(env, i, x, y, wall, column * params.room_width, door, door_way))
        if column < params.columns - 1:
            wall = _wall_right(column, row, params)
            way = min(way, _by_door(env, i, x, y, wall, (column + 1) * params.room_width, door, door_way))
        if row > 0:
            wall = _wall_above(column, row - 1, params)
            way = min(way, _by_door(env, i, y, x, wall, row * params.room_height, door, door_way))
        if row < params.rows - 1:
            wall = _wall_above(column, row, params)
            way = min(way, _by_door(env, i, y, x, wall, (row + 1) * params.room_height, door, door_way))
    return way


@kernel
def _find_ways(env, i, params, state, door_way):
    """The ways from all doors to the goal of robot i, from door to door until none gets shorter (Bellman-Ford)."""
    door = state.door
    door_way[env, i] = math.inf
    shorter = True
    while shorter:
        shorter = False
        for wall in range(door.shape[1]):
            if door[env, wall, 0] >= door[env, wall, 1]:
                continue
            column, row, next_column, next_row = _rooms_beside(wall, params)
            middle = 0.5 * (door[env, wall, 0] + door[env, wall, 1])
            if next_column > column:
                x, y = next_column * params.room_width, middle
            else:
                x, y = middle, next_row * params.room_height
            way = door_way[env, i, wall]
            way = min(way, _way_within(env, i, column, row, x, y, params, state, door_way))
            way = min(way, _way_within(env, i, next_column, next_row, x, y, params, state, door_way))
            shorter |= way < door_way[env, i, wall]
            door_way[env, i, wall] = way


@kernel
def _way_to_goal(env, i, x, y, params, state, door_way):
    """The shortest way from (x, y) to the goal of robot i, through the middle of each door on it.

    Doors that `reset` was given may lead nowhere: it is then the way through the walls.
    """
    way = math.inf
    if door_way.shape[2] > 0:
        column = _cell(x, params.columns, params.width)
        row = _cell(y, params.rows, params.height)
        way = _way_within(env, i, column, row, x, y, params, state, door_way)
    if way == math.inf:
        way = math.sqrt((state.goal[env, i, 0] - x) ** 2 + (state.goal[env, i, 1] - y) ** 2)
    return way


@kernel
def _measure_way(env, i, params, state, scratch):
    """Find the way of robot i to its goal anew, when either is somewhere else."""
    _find_ways(env, i, params, state, scratch.door_way)
    x, y = state.position[env, i, 0], state.position[env, i, 1]
    scratch.way[env, i] = _way_to_goal(env, i, x, y, params, state, scratch.door_way)


@kernel
def _measure_ways(params, state, scratch):
    for env in range(scratch.way.shape[0]):
        for i in range(scratch.way.shape[1]):
            _measure_way(env, i, params, state, scratch)


@kernel
def _set_goal(env, i, params, state, scratch):
    """A new goal for robot i, clear of the obstacles; the distance asked for shrinks as tries fail."""
    position = state.position[env]
    goal = state.goal[env]
    disc = scratch.disc
    rng = state.rng
    n_obstacles = state.obstacle.shape[1]
    for attempt in range(LIDAR_PLACING_TRIES):
        x = _uniform(rng, env, LIDAR_SPAWN_MARGIN, params.width - LIDAR_SPAWN_MARGIN)
        y = _uniform(rng, env, LIDAR_SPAWN_MARGIN, params.height - LIDAR_SPAWN_MARGIN)
        goal[i, 0], goal[i, 1] = x, y
        distance = math.hypot(x - position[i, 0], y - position[i, 1])
        far = distance >= LIDAR_GOAL_DISTANCE * (1.0 - attempt / LIDAR_PLACING_TRIES)
        clearance = LIDAR_ROBOT_RADIUS + LIDAR_SPAWN_GAP
        if far and not (_near_wall(x, y, clearance, params) or _overlaps(x, y, clearance, disc, n_obstacles)):
            break
    _begin_leg(env, i, params, state, scratch)


@kernel
def _begin_leg(env, i, params, state, scratch):
    """Robot i sets out for its goal from where it stands."""
    _measure_way(env, i, params, state, scratch)
    state.shortest[env, i] = max(scratch.way[env, i] - LIDAR_GOAL_RADIUS, 0.0)
    state.driven[env, i] = 0.0
    state.goal_age[env, i] = 0


@kernel
def _lidar_reset(env, draw_doors, draw_obstacles, draw_positions, draw_headings, draw_goals, params, state, scratch):
    """A new episode.

    In an arena that is all but full, something may find no place in LIDAR_PLACING_TRIES tries. An obstacle is then
    left out: radius 0, in a corner, where neither robot nor ray meets it. A robot is pushed clear by the first step.
    """
    position = state.position[env]
    direction = state.direction[env]
    obstacle = state.obstacle[env]
    rng = state.rng
    n_obstacles = obstacle.shape[0]
    width, height = params.width, params.height
    disc = scratch.disc

    # Doors
    if draw_doors and state.door.shape[1] > 0:
        _draw_doors(env, params, state, scratch.reached)

    # Obstacles
    for k in range(n_obstacles):
        if draw_obstacles:
            for _ in range(LIDAR_PLACING_TRIES):
                radius = _uniform(rng, env, LIDAR_OBSTACLE_RADII[0], LIDAR_OBSTACLE_RADII[1])
                x = _uniform(rng, env, radius + LIDAR_OBSTACLE_GAP, width - radius - LIDAR_OBSTACLE_GAP)
                y = _uniform(rng, env, radius + LIDAR_OBSTACLE_GAP, height - radius - LIDAR_OBSTACLE_GAP)
                clearance = radius + LIDAR_OBSTACLE_GAP
                if not (_near_wall(x, y, clearance, params) or _overlaps(x, y, clearance, disc, k)):
                    break
                radius = 0.0
                x = y = 0.0
            obstacle[k, 0], obstacle[k, 1] = x, y
            obstacle[k, 2] = radius
        disc[k] = obstacle[k]

    # Robots
    for i in range(position.shape[0]):
        if draw_positions:
            for _ in range(LIDAR_PLACING_TRIES):
                x = _uniform(rng, env, LIDAR_SPAWN_MARGIN, width - LIDAR_SPAWN_MARGIN)
                y = _uniform(rng, env, LIDAR_SPAWN_MARGIN, height - LIDAR_SPAWN_MARGIN)
                clearance = LIDAR_ROBOT_RADIUS + LIDAR_SPAWN_GAP
                if not (_near_wall(x, y, clearance, params) or _overlaps(x, y, clearance, disc, n_obstacles + i)):
                    break
            position[i, 0], position[i, 1] = x, y
            disc[n_obstacles + i, 0], disc[n_obstacles + i, 1] = x, y
            disc[n_obstacles + i, 2] = LIDAR_ROBOT_RADIUS
        if draw_headings:
            heading = _uniform(rng, env, -math.pi, math.pi)
            direction[i, 0], direction[i, 1] = math.cos(heading), math.sin(heading)

    # Goals
    for i in range(position.shape[0]):
        if draw_goals:
            _set_goal(env, i, params, state, scratch)
        else:
            _begin_leg(env, i, params, state, scratch)
    state.wheel[env] = 0.0
    state.contact[env] = False
    state.elapsed[env] = 0
    state.totals[env] = 0.0


@inlined
def _lidar_drive(env, actions, state, scratch):
    """Move every robot for one step as its wheels turn, as if it were alone.

    While the wheels keep their speed, the way is an arc; the chord of a turn of 2h is `sin(h) / h` of its length. This
    is exact. While they change it, the robot may turn early and drive late, or the other way round: it ends beside the
    arc of the mean speeds, to first order sideways by `bend`.
    """
    position = state.position[env]
    direction = state.direction[env]
    wheel = state.wheel[env]
    n_obstacles = state.obstacle.shape[1]
    disc = scratch.disc
    for k in range(n_obstacles):
        for c in range(3):
            disc[k, c] = state.obstacle[env, k, c]
    for i in range(position.shape[0]):
        # Wheels: what the motors ask for, and the mean speeds during the step
        left = LIDAR_WHEEL_SPEED * min(max(np.float64(actions[env, i, 0]), -1.0), 1.0)
        right = LIDAR_WHEEL_SPEED * min(max(np.float64(actions[env, i, 1]), -1.0), 1.0)
        left_gap, right_gap = wheel[i, 0] - left, wheel[i, 1] - right
        wheel[i, 0], wheel[i, 1] = left + LIDAR_GAP_LEFT * left_gap, right + LIDAR_GAP_LEFT * right_gap
        left, right = left + LIDAR_GAP_MEAN * left_gap, right + LIDAR_GAP_MEAN * right_gap

        # Arc
        speed = 0.5 * (left + right)
        half = 0.5 * LIDAR_DT / LIDAR_AXLE * (right - left)  # of the turn
        cos, sin = math.cos(half), math.sin(half)
        chord = LIDAR_DT * speed * (sin / half if abs(half) > 1e-6 else 1.0)
        bend = LIDAR_GAP_BEND / LIDAR_AXLE * (left * right_gap - right * left_gap)
        along_x, along_y = cos * direction[i, 0] - sin * direction[i, 1], sin * direction[i, 0] + cos * direction[i, 1]
        x = position[i, 0] + chord * along_x - bend * along_y
        y = position[i, 1] + chord * along_y + bend * along_x
        cos, sin = cos * along_x - sin * along_y, sin * along_x + cos * along_y
        norm = math.sqrt(cos * cos + sin * sin)  # keeps rounding from adding up over an episode
        direction[i, 0], direction[i, 1] = cos / norm, sin / norm

        # What contacts and rewards start from
        scratch.before[i, 0], scratch.before[i, 1] = position[i, 0], position[i, 1]
        scratch.free[i, 0], scratch.free[i, 1] = x, y
        scratch.speed[i] = speed
        disc[n_obstacles + i, 0], disc[n_obstacles + i, 1] = x, y
        disc[n_obstacles + i, 2] = LIDAR_ROBOT_RADIUS


@kernel
def _clear_wall(across, along, wall, begin, end, side):
    """A robot's coordinates across and along an inner wall, pushed clear of it, or of the nearer post of its door.

    The wall is thin, and the robot stays on the `side` (-1 or 1) of it where it was before the step, but for the door.
    """
    if not begin < along < end:
        return wall + side * max(side * (across - wall), LIDAR_ROBOT_RADIUS), along
    post = begin if along - begin < end - along else end
    distance = math.hypot(across - wall, along - post)
    push = max(LIDAR_ROBOT_RADIUS / max(distance, 1e-9), 1.0)
    return wall + push * (across - wall), post + push * (along - post)


@kernel
def _clear_walls(env, params, door, before, touched, disc, first):
    """Push the robots, from row `first` of `disc` on, clear of the inner walls of the rooms they were in `before`.

    Returns whether none of them was in contact.
    """
    clear = True
    for i in range(before.shape[0]):
        column = _cell(before[i, 0], params.columns, params.width)
        row = _cell(before[i, 1], params.rows, params.height)
        x, y = disc[first + i, 0], disc[first + i, 1]
        if column > 0:
            wall = _wall_right(column - 1, row, params)
            x, y = _clear_wall(x, y, column * params.room_width, door[env, wall, 0], door[env, wall, 1], 1.0)
        if column < params.columns - 1:
            wall = _wall_right(column, row, params)
            x, y = _clear_wall(x, y, (column + 1) * params.room_width, door[env, wall, 0], door[env, wall, 1], -1.0)
        if row > 0:
            wall = _wall_above(column, row - 1, params)
            y, x = _clear_wall(y, x, row * params.room_height, door[env, wall, 0], door[env, wall, 1], 1.0)
        if row < params.rows - 1:
            wall = _wall_above(column, row, params)
            y, x = _clear_wall(y, x, (row + 1) * params.room_height, door[env, wall, 0], door[env, wall, 1], -1.0)
        contact = max(abs(x - disc[first + i, 0]), abs(y - disc[first + i, 1])) > LIDAR_CONTACT_DEPTH
        clear &= not contact
        touched[i] |= contact
        disc[first + i, 0], disc[first + i, 1] = x, y
    return clear


@inlined
def _lidar_contacts(env, params, state, scratch):
    """Push robots out of whatever they overlap; one in contact drives only as fast as it really got ahead.

    All pushes of a pass are found before any is made, so that the robots' order does not matter. Two robots share a
    push equally; obstacles and walls do not yield. In a crowd a robot follows twice the mean of its pushes, as their
    sum would overshoot, and goes on with part of its last one. That way even a hundred robots that crowd against a
    wall overlap by 2 mm at most.
    """
    position = state.position[env]
    direction = state.direction[env]
    wheel = state.wheel[env]
    disc = scratch.disc
    push = scratch.push
    touched = scratch.touched
    order = scratch.order
    start = scratch.contact_start
    cells = params.contact_cells
    side = params.side
    n_agents = position.shape[0]
    first = state.obstacle.shape[1]  # the row of `disc` with the first robot
    for i in range(n_agents):
        touched[i] = False
        push[i, 0], push[i, 1] = 0.0, 0.0
    for _ in range(LIDAR_CONTACT_PASSES):
        # Pushes
        _sort_into_cells(disc, cells, side, order, start)
        for i in range(n_agents):
            x, y = disc[first + i, 0], disc[first + i, 1]
            push_x = push_y = 0.0
            pushes = 0
            row, column = _cell(x, cells, side), _cell(y, cells, side)
            for a in range(max(row - 1, 0), min(row + 2, cells)):
                begin = start[a * cells + max(column - 1, 0)]  # neighbouring cells of a row follow one another
                end = start[a * cells + min(column + 1, cells - 1) + 1]
                for m in range(begin, end):
                    k = order[m]
                    dx, dy = x - disc[k, 0], y - disc[k, 1]
                    reach = disc[k, 2] + LIDAR_ROBOT_RADIUS
                    if dx * dx + dy * dy < (reach - LIDAR_CONTACT_DEPTH) ** 2 and k != first + i:
                        distance = math.sqrt(dx * dx + dy * dy)
                        if distance < 1e-9:  # one on top of the other: along x, whoever comes first to the left
                            distance = 1e-9
                            dx, dy = 1e-9 if k < first + i else -1e-9, 0.0
                        share = (0.5 if k >= first else 1.0) * (reach / distance - 1.0)
                        push_x, push_y = push_x + share * dx, push_y + share * dy
                        pushes += 1
            weight = 2.0 / max(pushes, 2)
            kept = LIDAR_CONTACT_MOMENTUM if pushes > 0 else 0.0
            push[i, 0], push[i, 1] = weight * push_x + kept * push[i, 0], weight * push_y + kept * push[i, 1]
            touched[i] |= pushes > 0

        # Moves, and walls
        settled = True
        for i in range(n_agents):
            x, y = disc[first + i, 0] + push[i, 0], disc[first + i, 1] + push[i, 1]
            inside_x = min(max(x, LIDAR_ROBOT_RADIUS), params.width - LIDAR_ROBOT_RADIUS)
            inside_y = min(max(y, LIDAR_ROBOT_RADIUS), params.height - LIDAR_ROBOT_RADIUS)
            wall = max(abs(inside_x - x), abs(inside_y - y)) > LIDAR_CONTACT_DEPTH
            settled &= not (wall or push[i, 0] != 0.0 or push[i, 1] != 0.0)
            touched[i] |= wall
            disc[first + i, 0], disc[first + i, 1] = inside_x, inside_y
        if state.door.shape[1] > 0:
            settled &= _clear_walls(env, params, state.door, scratch.before, touched, disc, first)
        if settled:
            break

    # Positions, and what is left of the speed
    for i in range(n_agents):
        position[i, 0], position[i, 1] = disc[first + i, 0], disc[first + i, 1]
        if touched[i]:
            ahead = (position[i, 0] - scratch.free[i, 0]) * direction[i, 0]
            ahead += (position[i, 1] - scratch.free[i, 1]) * direction[i, 1]
            change = scratch.speed[i] + ahead / LIDAR_DT - 0.5 * (wheel[i, 0] + wheel[i, 1])
            for w in range(2):
                wheel[i, w] = min(max(wheel[i, w] + change, -LIDAR_WHEEL_SPEED), LIDAR_WHEEL_SPEED)


@kernel
def _scan(cos, sin, left, right, below, above, seen, n_seen, row):
    """One lidar: row[k] becomes the length of ray k, but for inner walls. All lengths are in lidar ranges.

    left, right, below and above are the distances to the walls; seen[:n_seen] are the discs. In float32 and without
    branches, so that it compiles to vector instructions over the rays. Lengths are within 1e-6 of the exact ones, or
    1e-3 where a ray only grazes a disc.
    """
    zero = np.float32(0.0)
    one = np.float32(1.0)

    # Walls
    for k in range(LIDAR_RAYS):
        dx, dy = cos * LIDAR_COS[k] - sin * LIDAR_SIN[k], sin * LIDAR_COS[k] + cos * LIDAR_SIN[k]
        to_x = (right if dx > zero else left) / abs(dx)
        to_y = (above if dy > zero else below) / abs(dy)
        row[k] = min(min(to_x, to_y), one)

    # Discs
    for m in range(n_seen):
        forward, aside = seen[m, 0], seen[m, 1]
        square = seen[m, 2]
        for k in range(LIDAR_RAYS):
            along = forward * LIDAR_COS[k] + aside * LIDAR_SIN[k]
            across = forward * LIDAR_SIN[k] - aside * LIDAR_COS[k]
            inside = square - across * across
            root = math.sqrt(max(inside, zero))
            hit = max(along - root, zero) if (inside > zero) & (along + root > zero) else one
            row[k] = min(row[k], hit)


@kernel
def _scan_wall(across_cos, across_sin, along_cos, along_sin, away, low, high, begin, end, row):
    """Cut the rays short at one inner wall, `away` across it, that reaches from low to high with a door in between.

    The first four turn a ray into its components across and along the wall.
    """
    for k in range(LIDAR_RAYS):
        length = away / (across_cos * LIDAR_COS[k] + across_sin * LIDAR_SIN[k])
        along = length * (along_cos * LIDAR_COS[k] + along_sin * LIDAR_SIN[k])
        solid = (along >= low) & (along <= high) & ((along <= begin) | (along >= end))
        hit = length if (length >= np.float32(0.0)) & solid else np.float32(1.0)
        row[k] = min(row[k], hit)


@kernel
def _scan_rooms(env, x, y, cos, sin, params, door, row):
    """Cut the rays of one lidar short at the inner walls within its range. x, y and rays are in lidar ranges."""
    width, height = params.room_width / LIDAR_RANGE, params.room_height / LIDAR_RANGE
    first_column, last_column = max(int((x - 1.0) / width), 0), min(int((x + 1.0) / width), params.columns - 1)
    first_row, last_row = max(int((y - 1.0) / height), 0), min(int((y + 1.0) / height), params.rows - 1)
    cos, sin = np.float32(cos), np.float32(sin)
    for r in range(first_row, last_row + 1):
        for c in range(first_column, last_column + 1):
            if c < last_column:
                wall = _wall_right(c, r, params)
                _scan_wall(
                    cos, -sin, sin, cos, np.float32((c + 1) * width - x),
                    np.float32(r * height - y), np.float32((r + 1) * height - y),
                    np.float32(door[env, wall, 0] / LIDAR_RANGE - y), np.float32(door[env, wall, 1] / LIDAR_RANGE - y),
                    row,
                )  # fmt: skip
            if r < last_row:
                wall = _wall_above(c, r, params)
                _scan_wall(
                    sin, cos, cos, -sin, np.float32((r + 1) * height - y),
                    np.float32(c * width - x), np.float32((c + 1) * width - x),
                    np.float32(door[env, wall, 0] / LIDAR_RANGE - x), np.float32(door[env, wall, 1] / LIDAR_RANGE - x),
                    row,
                )  # fmt: skip


@kernel
def _to_readings(row):
    """The lengths of rays as observed: near things get most of the scale, because only they are a reason to turn."""
    one = np.float32(1.0)
    for k in range(LIDAR_RAYS):
        row[k] = (np.float32(6.0) * row[k] - one) / (one + np.float32(4.0) * row[k])


def lidar_distance(reading):
    """What the rays of LidarNavigation have measured [m], from their readings (any shape); 3 where nothing is near."""
    return LIDAR_RANGE * (1.0 + reading) / (6.0 - 4.0 * reading)


@kernel
def _lidar_hear(env, position, direction, params, scratch, neighbors, observations):
    """What the robots of one environment know of their neighbours by radio: where they are, and where they head."""
    reach = params.radio_range
    cells = params.radio_cells
    order = scratch.radio_order
    start = scratch.radio_start
    _find_neighbors(env, position, reach, cells, params.side, order, start, scratch.nearest, neighbors)
    scale = 1.0 / reach
    for i in range(neighbors.shape[1]):
        x, y = position[env, i, 0], position[env, i, 1]
        cos, sin = direction[env, i, 0], direction[env, i, 1]
        for k in range(neighbors.shape[2]):
            j = neighbors[env, i, k]
            features = observations[env, i, k * NEIGHBOR_FEATURES : (k + 1) * NEIGHBOR_FEATURES]
            if j == i:
                features[:] = 0.0
                continue
            dx, dy = scale * (position[env, j, 0] - x), scale * (position[env, j, 1] - y)
            _observe_neighbor(
                cos * dx + sin * dy,
                cos * dy - sin * dx,
                cos * direction[env, j, 0] + sin * direction[env, j, 1],
                cos * direction[env, j, 1] - sin * direction[env, j, 0],
                features,
            )


@inlined
def _lidar_observe(env, params, state, scratch, outputs):
    """What every robot sees: its neighbours, its lidar, its own speeds and its goal."""
    position = state.position
    direction = state.direction
    obstacle = state.obstacle
    wheel = state.wheel
    observations = outputs.observations
    neighbors = outputs.neighbors
    unseen = outputs.unseen
    disc = scratch.disc
    order = scratch.order
    start = scratch.lidar_start
    placed = scratch.sorted
    seen = scratch.seen
    cells = params.lidar_cells
    side = params.side / LIDAR_RANGE
    n_agents, n_neighbors = neighbors.shape[1:]
    n_obstacles = obstacle.shape[1]
    lidar = n_neighbors * NEIGHBOR_FEATURES  # where a robot's own features begin: the rays, and then
    own = lidar + LIDAR_RAYS

    # Discs in the order of the grid, in lidar ranges
    for k in range(n_obstacles):
        for c in range(3):
            disc[k, c] = obstacle[env, k, c]
    for i in range(n_agents):
        disc[n_obstacles + i, 0], disc[n_obstacles + i, 1] = position[env, i, 0], position[env, i, 1]
        disc[n_obstacles + i, 2] = LIDAR_ROBOT_RADIUS
    _sort_into_cells(disc, cells, params.side, order, start)
    for m in range(disc.shape[0]):
        for c in range(3):
            placed[m, c] = disc[order[m], c] / LIDAR_RANGE

    for m in range(disc.shape[0]):
        i = order[m] - n_obstacles
        if i < 0:
            continue
        x, y = placed[m, 0], placed[m, 1]
        cos, sin = direction[env, i, 0], direction[env, i, 1]

        # Whatever the lidar can hit
        n_seen = 0
        row, column = _cell(x, cells, side), _cell(y, cells, side)
        for a in range(max(row - 1, 0), min(row + 2, cells)):
            begin = start[a * cells + max(column - 1, 0)]  # neighbouring cells of a row follow one another
            end = start[a * cells + min(column + 1, cells - 1) + 1]
            for other in range(begin, end):  # keep or overwrite: a branch would mispredict
                dx, dy = placed[other, 0] - x, placed[other, 1] - y
                radius = placed[other, 2]
                seen[n_seen, 0], seen[n_seen, 1] = cos * dx + sin * dy, cos * dy - sin * dx
                seen[n_seen, 2] = radius * radius
                n_seen += (dx * dx + dy * dy < (1.0 + radius) ** 2) & (other != m)

        # Rays
        rays = observations[env, i, lidar:own]
        _scan(
            np.float32(cos), np.float32(sin), np.float32(x), np.float32(params.width / LIDAR_RANGE - x),
            np.float32(y), np.float32(params.height / LIDAR_RANGE - y), seen, n_seen, rays,
        )  # fmt: skip
        if state.door.shape[1] > 0:
            _scan_rooms(env, x, y, cos, sin, params, state.door, rays)
        _to_readings(rays)

        # Forward speed and yaw rate, by their largest
        observations[env, i, own] = (wheel[env, i, 0] + wheel[env, i, 1]) / (2.0 * LIDAR_WHEEL_SPEED)
        observations[env, i, own + 1] = (wheel[env, i, 1] - wheel[env, i, 0]) / (2.0 * LIDAR_WHEEL_SPEED)

        # Goal, while it is shown
        dx, dy = state.goal[env, i, 0] - position[env, i, 0], state.goal[env, i, 1] - position[env, i, 1]
        shown = (state.goal_age[env, i] < params.goal_visible_steps) / (1.0 + math.sqrt(dx * dx + dy * dy))
        observations[env, i, own + 2] = shown * (cos * dx + sin * dy)
        observations[env, i, own + 3] = shown * (cos * dy - sin * dx)
        unseen[env, i, 0] = (cos * dx + sin * dy) / LIDAR_RANGE
        unseen[env, i, 1] = (cos * dy - sin * dx) / LIDAR_RANGE
    if n_neighbors > 0:
        _lidar_hear(env, position, direction, params, scratch, neighbors, observations)


@inlined
def _lidar_reward(env, params, state, scratch, outputs):
    """Rewards and statistics of the step, and a new goal for whoever has arrived."""
    position = state.position
    goal = state.goal
    before = scratch.before
    terms = scratch.terms
    totals = state.totals
    n_agents = position.shape[1]
    for i in range(n_agents):
        # Reward terms
        x, y = position[env, i, 0], position[env, i, 1]
        distance = math.sqrt((goal[env, i, 0] - x) ** 2 + (goal[env, i, 1] - y) ** 2)
        way = distance
        if scratch.door_way.shape[2] > 0:  # a call, not inlined: in this loop it would slow down arenas without rooms
            way = _way_to_goal(env, i, x, y, params, state, scratch.door_way)
        terms[i, LIDAR_PROGRESS] = scratch.way[env, i] - way
        scratch.way[env, i] = way
        terms[i, LIDAR_ARRIVAL] = distance <= LIDAR_GOAL_RADIUS
        terms[i, LIDAR_COLLISION] = -np.float64(scratch.touched[i])
        terms[i, LIDAR_TIME] = -1.0

        # Contacts, and the way to the goal
        driven = math.sqrt((x - before[i, 0]) ** 2 + (y - before[i, 1]) ** 2)
        totals[env, LIDAR_STAT_COLLISIONS] += scratch.touched[i] and not state.contact[env, i]
        totals[env, LIDAR_STAT_CONTACT] += scratch.touched[i]
        state.contact[env, i] = scratch.touched[i]
        state.goal_age[env, i] += 1
        state.driven[env, i] += driven
        if distance <= LIDAR_GOAL_RADIUS:
            totals[env, LIDAR_STAT_GOALS] += 1.0
            totals[env, LIDAR_SUM_SHORTEST] += state.shortest[env, i]
            totals[env, LIDAR_SUM_DRIVEN] += state.driven[env, i]
            _set_goal(env, i, params, state, scratch)
    totals[env, LIDAR_STAT_LENGTH] += 1.0

    # Rewards
    for i in range(n_agents):
        outputs.rewards[env, i] = 0.0
    for t in range(len(LIDAR_REWARD_TERMS)):
        total = 0.0
        for i in range(n_agents):
            outputs.rewards[env, i] += params.weights[t] * terms[i, t]
            total += params.weights[t] * terms[i, t]
        totals[env, LIDAR_STAT_TERMS + t] += total / n_agents
        totals[env, LIDAR_STAT_RETURN] += total / n_agents


@kernel
def _lidar_stats(n_agents, totals, stats):
    """The statistics of an episode that has ended, from its sums."""
    goals = totals[LIDAR_STAT_GOALS]
    collisions = totals[LIDAR_STAT_COLLISIONS]
    shortest = totals[LIDAR_SUM_SHORTEST]
    driven = totals[LIDAR_SUM_DRIVEN]
    stats[:] = totals
    stats[LIDAR_STAT_GOALS] = goals / n_agents
    stats[LIDAR_STAT_COLLISIONS] = collisions / n_agents
    stats[LIDAR_STAT_COLLISIONS_PER_GOAL] = collisions / max(goals, 1.0)
    stats[LIDAR_STAT_PATH_EFFICIENCY] = shortest / driven if driven > 0.0 else 0.0
    stats[LIDAR_STAT_CONTACT] = totals[LIDAR_STAT_CONTACT] / (n_agents * totals[LIDAR_STAT_LENGTH])


@kernel
def _lidar_step(actions, params, state, scratch, outputs):
    for env in range(actions.shape[0]):
        _lidar_drive(env, actions, state, scratch)
        _lidar_contacts(env, params, state, scratch)
        _lidar_reward(env, params, state, scratch, outputs)  # sets new goals, so that they are observed at once
        _lidar_observe(env, params, state, scratch, outputs)
        state.elapsed[env] += 1
        outputs.truncations[env] = state.elapsed[env] >= params.max_steps
        if outputs.truncations[env]:
            outputs.final_observations[env] = outputs.observations[env]
            outputs.final_neighbors[env] = outputs.neighbors[env]
            outputs.final_unseen[env] = outputs.unseen[env]
            _lidar_stats(actions.shape[1], state.totals[env], outputs.stats[env])
            _lidar_reset(env, True, True, True, True, True, params, state, scratch)
            _lidar_observe(env, params, state, scratch, outputs)


class LidarNavigation(NativeVectorEnv):
    """Robots with two wheels and a lidar, each on the way to one goal after another, in an arena with walls.

    Action (num_envs, n_agents, 2): the left and the right motor. 1 is full speed, LIDAR_WHEEL_SPEED, and so is more, up
    to LIDAR_LARGEST_COMMAND: policies that tanh keeps within the bounds never get to the bounds themselves. The wheels
    follow with the lag LIDAR_WHEEL_LAG and do not slip: forward speed is their mean, yaw rate their difference over
    LIDAR_AXLE. A step of LIDAR_DT is within 0.01 mm of the differential equation. A robot is a disc. In contact with a
    wall, an obstacle or another robot it is pushed clear, sliding along, and its forward speed becomes what it really
    got ahead.

    Observation (num_envs, n_agents, 8 * n_neighbors + 36), in the robot's own frame:

        8 each    the `n_neighbors` (0 by default) nearest other robots within `radio_range` [m], also behind obstacles,
                  nearest first: as of a neighbour in Swarm, with radio ranges for radii; all zeros for an absent one
        32    rays of the lidar, the first straight ahead and then counter-clockwise, from the robot's centre to the
              nearest wall, obstacle or robot; (6 d - 1) / (1 + 4 d) at a distance of d lidar ranges
        1     forward speed, by its largest
        1     yaw rate, by its largest
        2     the goal (forward, left) / (1 m + distance): its direction and, within (-1, 1), its distance

    A ray reads exactly 1 where nothing is within range, -1 at no distance, and the last 0.5 m take half of the scale.
    Policies learn faster from this than from a linear scale, or from one that starts at 0, of which tanh layers see
    little but the mean. `lidar_distance` gives metres back. With `goal_visible_steps` a goal is in that many
    observations, from the one on which it was set, and (0, 0) in all later ones: it has to be remembered. Where it
    truly is always comes as `infos["unseen"]` (num_envs, n_agents, 2), forward and left in lidar ranges, for training.

    A robot within LIDAR_GOAL_RADIUS of its goal has arrived and gets a new goal in the same step. Reward of a robot:
    the weighted sum of these terms.

        progress      decrease of the way to the goal in this step [m]
        arrival       1 on arrival
        collision     -1 on a step in contact
        time          -1

    Episodes end only at `max_steps`, by truncation. Episode statistics:

        r, l                   return, mean over robots, and length
        goals                  arrivals per robot
        collisions             how often a robot came into contact, per robot
        collisions_per_goal    how often any robot came into contact, over all arrivals (at least 1)
        path_efficiency        of the goals reached, the shortest ways from where each was set to the edge of its
                               circle, over the ways driven for them; 0 if none was reached
        contact                share of steps in contact, mean over robots
        reward_<term>          the weighted reward terms, means over robots; they add up to r

    With `rooms`, a text like "3x2" (columns along x, rows along y; 0: none), thin inner walls divide the arena into
    equal rooms, at least LIDAR_ROOM_SIDE wide and high. New doors, LIDAR_DOOR wide, connect all of them in every
    episode. Goals are observed straight, through the walls. Progress and path efficiency count the shortest way through
    the middles of the doors, obstacles left out; a path efficiency above 1 is possible.

    Every episode has new obstacles, with gaps that a robot can pass, new starts and new goals. `reset(options=
    {"position": (num_envs, n_agents, 2), "heading": (num_envs, n_agents), "goal": (num_envs, n_agents, 2), "obstacle":
    (num_envs, n_obstacles, 3: x, y, radius), "door": (num_envs, n_walls, 2: begin and end along its wall [m], 0 and 0
    for none)})` gives any part of the start; the episodes after it start at random again. The walls between columns
    come first, then those between rows, both row by row. A robot given a place that something else occupies is pushed
    clear by the first step.

    The arena, lidar, robots, rate and goals are those of Entropy Engine V2 (see README), 100 pixels to the metre.
    """

    metadata = NativeVectorEnv.metadata | {"render_fps": round(1.0 / LIDAR_DT)}
    info_names = ("unseen",)
    unseen_dim = 2
    stat_names = (
        *("r", "l", "goals", "collisions", "collisions_per_goal", "path_efficiency", "contact"),
        *(f"reward_{term}" for term in LIDAR_REWARD_TERMS),
    )

    def __init__(
        self,
        num_envs=1,
        n_agents=10,
        n_obstacles=8,
        width=8.0,
        height=6.0,
        rooms=0,
        max_steps=500,
        goal_visible_steps=None,
        n_neighbors=0,
        radio_range=LIDAR_RANGE,
        progress_weight=1.0,
        arrival_weight=2.0,
        collision_weight=1.0,
        time_weight=0.01,
        render_mode=None,
        first_env=0,
    ):
        n_agents = _integer("n_agents", n_agents, 1, LARGEST_SIZE)
        n_obstacles = _integer("n_obstacles", n_obstacles, 0, LARGEST_SIZE)
        width, height = _number("width", width, 3.0), _number("height", height, 3.0)
        columns, rows = _valid_rooms(rooms, width, height)
        n_walls = rows * (columns - 1) + columns * (rows - 1)
        # Thrown at random, discs with half their gap find room until they cover about a half; a quarter leaves ways.
        for name, count, radius, border, gap in (
            ("n_agents", n_agents, LIDAR_ROBOT_RADIUS, 1.0, LIDAR_SPAWN_GAP),
            ("n_obstacles", n_obstacles, 0.5 * sum(LIDAR_OBSTACLE_RADII), 0.0, LIDAR_OBSTACLE_GAP),
        ):
            area = (width - border - gap * (columns - 1)) * (height - border - gap * (rows - 1))
            most = int(0.25 * area / (math.pi * (radius + 0.5 * gap) ** 2))
            if count > most:
                raise ValueError(f"{name} is {count}: at most {most} have room in an arena of {width:g} x {height:g} m")
        if goal_visible_steps is not None:
            goal_visible_steps = _integer("goal_visible_steps", goal_visible_steps, 1)
        n_neighbors = _integer("n_neighbors", n_neighbors, 0, LARGEST_SIZE)
        radio_range = _number("radio_range", radio_range, 1e-6)
        weights = dict(
            progress_weight=progress_weight,
            arrival_weight=arrival_weight,
            collision_weight=collision_weight,
            time_weight=time_weight,
        )
        side = max(width, height)
        n_discs = n_obstacles + n_agents
        self.params = LidarParams(
            width=width,
            height=height,
            columns=columns,
            rows=rows,
            room_width=width / columns,
            room_height=height / rows,
            max_steps=_integer("max_steps", max_steps, 1),
            goal_visible_steps=2**62 if goal_visible_steps is None else goal_visible_steps,
            side=side,
            lidar_cells=_cells_along(side, LIDAR_RANGE + LIDAR_OBSTACLE_RADII[1], n_discs),
            contact_cells=_cells_along(side, LIDAR_ROBOT_RADIUS + LIDAR_OBSTACLE_RADII[1], n_discs / 2),
            radio_cells=_cells_along(side, radio_range, n_agents),
            radio_range=radio_range,
            weights=np.array([_number(name, weight) for name, weight in weights.items()]),
        )
        self.max_steps = self.params.max_steps
        low = np.float32([*NEIGHBOR_LOW * n_neighbors, *[-1.0] * (LIDAR_RAYS + LIDAR_OWN_FEATURES)])
        super().__init__(
            num_envs,
            gym.spaces.Box(np.tile(low, (n_agents, 1)), 1.0, dtype=np.float32),
            gym.spaces.Box(-LIDAR_LARGEST_COMMAND, LIDAR_LARGEST_COMMAND, (n_agents, 2), np.float32),
            render_mode,
            first_env,
        )
        self.start_shapes = {
            "position": (num_envs, n_agents, 2),
            "heading": (num_envs, n_agents),
            "goal": (num_envs, n_agents, 2),
            "obstacle": (num_envs, n_obstacles, 3),
            "door": (num_envs, n_walls, 2),
        }
        corner = np.array([self.params.width, self.params.height])
        self.start_bounds = {
            "position": (LIDAR_ROBOT_RADIUS, corner - LIDAR_ROBOT_RADIUS),
            "goal": (0.0, corner),
            "obstacle": (0.0, np.append(corner, LIDAR_OBSTACLE_RADII[1])),
            "door": (0.0, side),
        }
        self.buffers["neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        self.buffers["final_neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        self.buffers["unseen"] = np.zeros((num_envs, n_agents, self.unseen_dim), np.float32)
        self.buffers["final_unseen"] = np.zeros((num_envs, n_agents, self.unseen_dim), np.float32)
        if n_neighbors > 0:
            self.info_names = ("neighbors", "unseen")
        self.state = LidarState(
            position=np.zeros((num_envs, n_agents, 2)),
            direction=np.zeros((num_envs, n_agents, 2)),
            wheel=np.zeros((num_envs, n_agents, 2)),
            contact=np.zeros((num_envs, n_agents), bool),
            goal=np.zeros((num_envs, n_agents, 2)),
            goal_age=np.zeros((num_envs, n_agents), np.int64),
            shortest=np.zeros((num_envs, n_agents)),
            driven=np.zeros((num_envs, n_agents)),
            obstacle=np.zeros((num_envs, n_obstacles, 3)),
            door=np.zeros((num_envs, n_walls, 2)),
            elapsed=np.zeros(num_envs, np.int64),
            totals=np.zeros((num_envs, len(self.stat_names))),
            rng=np.zeros((num_envs, 2), np.int64),
        )
        self.scratch = LidarScratch(
            terms=np.zeros((n_agents, len(LIDAR_REWARD_TERMS))),
            disc=np.zeros((n_discs, 3)),
            before=np.zeros((n_agents, 2)),
            free=np.zeros((n_agents, 2)),
            speed=np.zeros(n_agents),
            push=np.zeros((n_agents, 2)),
            touched=np.zeros(n_agents, bool),
            order=np.zeros(n_discs, np.int64),
            lidar_start=np.zeros(self.params.lidar_cells**2 + 1, np.int64),
            contact_start=np.zeros(self.params.contact_cells**2 + 1, np.int64),
            sorted=np.zeros((n_discs, 3)),
            seen=np.zeros((n_discs, 3), np.float32),
            radio_order=np.zeros(n_agents, np.int64),
            radio_start=np.zeros(self.params.radio_cells**2 + 1, np.int64),
            nearest=np.zeros(n_neighbors),
            reached=np.zeros(columns * rows, bool),
            door_way=np.zeros((num_envs, n_agents, n_walls)),
            way=np.zeros((num_envs, n_agents)),
        )

    def restart(self, start):
        for name in set(start) - {"heading"}:
            getattr(self.state, name)[...] = start[name]
        if "heading" in start:
            self.state.direction[...] = np.stack([np.cos(start["heading"]), np.sin(start["heading"])], axis=-1)
        draw = [name not in start for name in ("door", "obstacle", "position", "heading", "goal")]
        for env in range(self.num_envs):
            _lidar_reset(env, *draw, self.params, self.state, self.scratch)

    def observe(self):
        for env in range(self.num_envs):
            _lidar_observe(env, self.params, self.state, self.scratch, Outputs(**self.buffers))
        _measure_ways(self.params, self.state, self.scratch)

    def advance(self, actions):
        _lidar_step(actions, self.params, self.state, self.scratch, Outputs(**self.buffers))

    def wall_pieces(self, env):
        """The inner walls of one environment, without their doors: (n, 2, 2), from where to where [m]."""
        columns, rows = self.params.columns, self.params.rows
        width, height = self.params.room_width, self.params.room_height
        beside = [((column + 1) * width, row * height) for row in range(rows) for column in range(columns - 1)]
        above = [(column * width, (row + 1) * height) for row in range(rows - 1) for column in range(columns)]
        pieces = []
        for wall, (x, y) in enumerate(beside + above):
            begin, end = self.state.door[env, wall]
            if wall < len(beside):
                pieces += [((x, y), (x, max(begin, y))), ((x, max(end, y)), (x, y + height))]
            else:
                pieces += [((x, y), (max(begin, x), y)), ((max(end, x), y), (x + width, y))]
        return np.reshape(pieces, (-1, 2, 2))

    def draw(self, env, size=512):
        """Robots with a mark ahead, rings in their colour for goals, the first one's lidar; the longer side `size`.

        Radio links, if there are any, are thin lines.
        """
        import pygame

        scale = 2 * size / self.params.side  # drawn at twice the size, then smoothed
        shape = [2 * round(0.5 * scale * length) for length in (self.params.width, self.params.height)]
        surface = pygame.Surface(shape)
        surface.fill("white")
        for x, y, radius in scale * self.state.obstacle[env]:
            pygame.draw.circle(surface, "gray70", (x, y), radius)
        for begin, end in scale * self.wall_pieces(env):
            pygame.draw.line(surface, "black", begin.tolist(), end.tolist(), 6)
        position = scale * self.state.position[env]
        direction = self.state.direction[env]
        _draw_links(surface, position, self.buffers["neighbors"][env])
        cos, sin = direction[0]
        own = self.buffers["observations"][env, 0, -LIDAR_RAYS - LIDAR_OWN_FEATURES :]
        rays = scale * lidar_distance(own[:LIDAR_RAYS])
        for reach, ahead, left in zip(rays, LIDAR_COS, LIDAR_SIN, strict=True):
            end = position[0] + reach * np.array([cos * ahead - sin * left, sin * ahead + cos * left])
            pygame.draw.line(surface, (255, 205, 205), position[0], end, 2)
        for i, (x, y) in enumerate(position):
            color = pygame.Color(0)
            color.hsva = (360.0 * i / len(position), 80, 80, 100)
            pygame.draw.circle(surface, color, scale * self.state.goal[env, i], scale * LIDAR_GOAL_RADIUS, 3)
            pygame.draw.circle(surface, color, (x, y), scale * LIDAR_ROBOT_RADIUS)
            pygame.draw.line(surface, "white", (x, y), (x, y) + scale * LIDAR_ROBOT_RADIUS * direction[i], 5)
        pygame.draw.rect(surface, "black", surface.get_rect(), 6)
        surface = pygame.transform.smoothscale(surface, [length // 2 for length in shape])
        return pygame.surfarray.array3d(pygame.transform.flip(surface, False, True)).swapaxes(0, 1).copy()  # y is up


def steering_policy(envs, reach=0.45, push=1.4, gain=0.4):
    """Turn to the goal, and away from the nearest thing that the lidar sees, the more the nearer it is.

    Something in contact weighs `push` times as much as the goal, something `reach` away [m] nothing; `gain` turns a
    bearing [rad] into motor commands. A goal that is not shown is straight ahead.
    """
    bearing = np.arange(LIDAR_RAYS) * (2.0 * math.pi / LIDAR_RAYS)

    def act(observations, infos):
        observations = observations[..., -LIDAR_RAYS - LIDAR_OWN_FEATURES :]  # without those of neighbours
        reading = observations[..., :LIDAR_RAYS].astype(float)  # (num_envs, n_agents, rays)
        gaps = lidar_distance(reading) - LIDAR_ROBOT_RADIUS
        weight = push * np.maximum(1.0 - gaps.min(-1) / reach, 0.0)
        nearest = bearing[gaps.argmin(-1)]
        x, y = np.moveaxis(observations[..., LIDAR_RAYS + 2 :].astype(float), -1, 0)
        to_goal = np.arctan2(y, x)
        turn = np.arctan2(
            np.sin(to_goal) - weight * np.sin(nearest), np.cos(to_goal) - weight * np.cos(nearest)
        )  # (num_envs, n_agents)
        forward = np.maximum(np.cos(turn), 0.0)
        turn = np.clip(gain * turn, -1.0, 1.0)
        return np.clip(np.stack([forward - turn, forward + turn], axis=-1), -1.0, 1.0).astype(np.float32)

    return act


def planning_policy(envs, width=0.14, ahead=1.6, patience=1.0, gain=0.7, brake=0.55):
    """Drive where the way is longest for the detour, as seen by the lidar; a hidden goal is kept by dead reckoning.

    Each ray is a way to go, as long as a corridor of half-width `width` along it is free, at most `ahead` or the
    distance to the goal [m]; `patience` is the share of that length which a detour of half a turn costs. `gain` turns
    a bearing [rad] into motor commands, and the robot slows down with less than `brake` free ahead [m].
    """
    bearing = np.arange(LIDAR_RAYS) * (2.0 * math.pi / LIDAR_RAYS)
    cos = np.cos(bearing - bearing[:, None])  # (ways, rays)
    sin = np.abs(np.sin(bearing - bearing[:, None]))
    goal = np.zeros((*envs.action_space.shape[:2], 2))  # where it was last known, forward and left [m]
    last = np.zeros_like(goal)  # forward speed and yaw rate of the step before [m/s, rad/s]
    fastest = [LIDAR_WHEEL_SPEED, 2.0 * LIDAR_WHEEL_SPEED / LIDAR_AXLE]  # and the largest of these

    def act(observations, infos):
        observations = observations[..., -LIDAR_RAYS - LIDAR_OWN_FEATURES :]  # without those of neighbours

        # The goal: where it is seen, or where it must be by now
        speed = observations[..., LIDAR_RAYS : LIDAR_RAYS + 2] * fastest
        moved, turned = np.moveaxis(0.5 * LIDAR_DT * (speed + last), -1, 0)
        last[...] = speed
        x, y = goal[..., 0] - moved * np.cos(0.5 * turned), goal[..., 1] - moved * np.sin(0.5 * turned)
        remembered = np.stack(
            [np.cos(turned) * x + np.sin(turned) * y, np.cos(turned) * y - np.sin(turned) * x], axis=-1
        )
        shown = observations[..., LIDAR_RAYS + 2 :].astype(float)
        length = np.linalg.norm(shown, axis=-1, keepdims=True)
        goal[...] = np.where(length > 0.0, shown / (1.0 - length), remembered)
        distance = np.linalg.norm(goal, axis=-1)
        to_goal = np.arctan2(goal[..., 1], goal[..., 0])

        # Ways: how far each is free, and the longest for its detour
        reading = lidar_distance(observations[..., None, :LIDAR_RAYS])  # (num_envs, n_agents, 1, rays)
        blocks = (reading < LIDAR_RANGE) & (cos > 0.0) & (reading * sin < width)
        free = np.where(blocks, reading * cos, LIDAR_RANGE).min(-1) - LIDAR_ROBOT_RADIUS  # (num_envs, n_agents, ways)
        enough = np.minimum(ahead, distance)[..., None]
        detour = np.abs((bearing - to_goal[..., None] + math.pi) % (2.0 * math.pi) - math.pi)
        way = np.argmax(np.minimum(free / enough, 1.0) - patience * detour / math.pi, axis=-1)

        # Motors
        straight = np.take_along_axis(detour, way[..., None], -1)[..., 0] < math.pi / LIDAR_RAYS
        turn = np.where(straight, to_goal, (bearing[way] + math.pi) % (2.0 * math.pi) - math.pi)
        forward = np.maximum(np.cos(turn), 0.0) * np.clip(free[..., 0] / brake, 0.0, 1.0)
        turn = np.clip(gain * turn, -1.0, 1.0)
        return np.clip(np.stack([forward - turn, forward + turn], axis=-1), -1.0, 1.0).astype(np.float32)

    return act


# ----------------------------------------------------------------------------------------------------------------------
# VmasNavigation
# ----------------------------------------------------------------------------------------------------------------------
# The constants are those of VMAS 1.5.2 (Bettini et al., arXiv 2207.03530): its world and its `navigation` scenario.

VMAS_SUBSTEPS = 2  # of the physics in one step
VMAS_DT = 0.05  # of a substep [time]
VMAS_DRAG = 0.25  # share of the velocity lost in a step
VMAS_RADIUS = 0.1  # of an agent; it has arrived with its centre this near to its goal [length]
VMAS_GOAL_RADIUS = 0.05  # the final reward wants every agent this near [length]
VMAS_STIFFNESS = 100.0  # force per depth of a contact; an agent's mass is 1
VMAS_MARGIN = 1e-3  # a contact sets in softly over about this depth [length]
VMAS_RANGE = 0.35  # of the lidar, from the agent's centre [length]
VMAS_RAYS = 12  # of the lidar, at fixed angles in the world, the first along x
VMAS_OWN_FEATURES = 6  # position, velocity, position minus goal; the lidar follows
VMAS_SPACING = 0.25  # between any two agents or goals at the start [length]
VMAS_SPAWN_TRIES = 1000  # places tried for each of them
VMAS_REWARD_TERMS = ("progress", "final", "collision")

# Columns of `totals` and `stats`, in the order of VmasNavigation.stat_names.
VMAS_STAT_RETURN = 0
VMAS_STAT_LENGTH = 1
VMAS_STAT_COLLISIONS = 2
VMAS_STAT_ARRIVED = 3
VMAS_STAT_PROGRESS = 4
VMAS_STAT_FINAL = 5
VMAS_STAT_COLLISION = 6

# Directions of the rays of one half (6,); those of the other half are opposite.
VMAS_COS = np.cos(2.0 * np.pi / VMAS_RAYS * np.arange(VMAS_RAYS // 2))
VMAS_SIN = np.sin(2.0 * np.pi / VMAS_RAYS * np.arange(VMAS_RAYS // 2))


class VmasParams(NamedTuple):
    max_steps: int
    radio_range: float  # [length]
    pos_shaping_factor: float
    final_reward: float
    agent_collision_penalty: float


class VmasState(NamedTuple):
    agent_pos: np.ndarray  # (num_envs, n_agents, 2)
    agent_vel: np.ndarray  # (num_envs, n_agents, 2)
    goal_pos: np.ndarray  # (num_envs, n_agents, 2)
    elapsed: np.ndarray  # (num_envs,), steps since the reset
    totals: np.ndarray  # (num_envs, len(stat_names)), sums over the episode so far
    rng: np.ndarray  # (num_envs, 2)


class VmasScratch(NamedTuple):
    force: np.ndarray  # (n_agents, 2)
    touching: np.ndarray  # (n_agents,), how many others an agent touches
    distance: np.ndarray  # (num_envs,), of all agents to their goals, summed, before the step
    order: np.ndarray  # (n_agents,), agents in the one cell of a grid
    start: np.ndarray  # (2,)
    nearest: np.ndarray  # (n_neighbors,), squared distances of an agent's nearest so far


@kernel
def _nearest_squared(x, y, points, count, stop):
    """The squared distance to the nearest of the first `count` points, or to the first one found within `stop`."""
    nearest = math.inf
    for k in range(count):
        dx, dy = points[k, 0] - x, points[k, 1] - y
        nearest = min(nearest, dx * dx + dy * dy)
        if nearest < stop:
            break
    return nearest


@kernel
def _vmas_spawn(env, agents, goals, rng):
    """All agents, then all goals, in [-1, 1]^2 and VMAS_SPACING apart; of tries that all fail, the most distant one."""
    n_agents = agents.shape[0]
    tries = VMAS_SPAWN_TRIES
    for i in range(2 * n_agents):
        best = -1.0
        for _ in range(tries):
            x, y = _uniform(rng, env, -1.0, 1.0), _uniform(rng, env, -1.0, 1.0)
            distance = _nearest_squared(x, y, agents, min(i, n_agents), best)
            if distance > best:
                distance = min(distance, _nearest_squared(x, y, goals, i - n_agents, best))
            if distance > best:
                best = distance
                if i < n_agents:
                    agents[i, 0], agents[i, 1] = x, y
                else:
                    goals[i - n_agents, 0], goals[i - n_agents, 1] = x, y
            if best >= VMAS_SPACING**2:
                break
        else:
            if i >= n_agents:
                tries = VMAS_SPAWN_TRIES // 10  # the square is full, and the other goals will find no place either


@inlined
def _vmas_reset(env, state):
    """A new episode: everyone at rest, agents and goals at random."""
    _vmas_spawn(env, state.agent_pos[env], state.goal_pos[env], state.rng)
    state.agent_vel[env] = 0.0
    state.elapsed[env] = 0
    state.totals[env] = 0.0


@kernel
def _vmas_move(env, actions, position, velocity, force):
    """One step of one environment: the actions are forces, touching agents push each other apart.

    This and the kernels below take whole arrays and the index of an environment: cutting out its part of them would
    cost a sixth of a step.
    """
    n_agents = position.shape[1]
    for substep in range(VMAS_SUBSTEPS):
        # Actions
        for i in range(n_agents):
            force[i, 0] = min(max(np.float64(actions[env, i, 0]), -1.0), 1.0)
            force[i, 1] = min(max(np.float64(actions[env, i, 1]), -1.0), 1.0)

        # Contacts
        for i in range(n_agents):
            for j in range(i):
                dx, dy = position[env, i, 0] - position[env, j, 0], position[env, i, 1] - position[env, j, 1]
                squared = dx * dx + dy * dy
                if squared <= (2.0 * VMAS_RADIUS) ** 2:
                    distance = math.sqrt(squared)
                    if distance >= 1e-6:  # VMAS lets agents on the same spot alone
                        depth = 2.0 * VMAS_RADIUS - distance
                        depth += VMAS_MARGIN * math.log1p(math.exp(-depth / VMAS_MARGIN))
                        push = VMAS_STIFFNESS * depth / distance
                        force[i, 0], force[i, 1] = force[i, 0] + push * dx, force[i, 1] + push * dy
                        force[j, 0], force[j, 1] = force[j, 0] - push * dx, force[j, 1] - push * dy

        # Velocities and positions
        kept = 1.0 - VMAS_DRAG if substep == 0 else 1.0
        for i in range(n_agents):
            for axis in range(2):
                velocity[env, i, axis] = kept * velocity[env, i, axis] + VMAS_DT * force[i, axis]
                position[env, i, axis] += VMAS_DT * velocity[env, i, axis]


@kernel
def _vmas_see(dx, dy, lidar, other_lidar):
    """Enter two agents in each other's lidar readings (12,); the other one is (dx, dy) away.

    A ray of one and the opposite ray of the other lie along parallel lines and read the same.
    """
    half = VMAS_RAYS // 2
    for k in range(half):
        along = dx * VMAS_COS[k] + dy * VMAS_SIN[k]
        across = dx * VMAS_SIN[k] - dy * VMAS_COS[k]
        chord = VMAS_RADIUS**2 - across * across
        if chord > 0.0 and along != 0.0:
            reading = np.float32(VMAS_RANGE - abs(along) + math.sqrt(chord))
            ahead = k if along > 0.0 else half + k
            behind = half + k if along > 0.0 else k
            lidar[ahead] = max(lidar[ahead], reading)
            other_lidar[behind] = max(other_lidar[behind], reading)


@kernel
def _vmas_look(env, position, velocity, goal, touching, observations):
    """What the agents of one environment see by themselves, and how many others each touches."""
    n_agents = position.shape[1]
    first = observations.shape[2] - VMAS_OWN_FEATURES - VMAS_RAYS  # after the neighbours
    lidar = first + VMAS_OWN_FEATURES
    for i in range(n_agents):
        touching[i] = 0.0
        own = observations[env, i, first:]
        for axis in range(2):
            own[axis] = position[env, i, axis]
            own[2 + axis] = velocity[env, i, axis]
            own[4 + axis] = position[env, i, axis] - goal[env, i, axis]
        for k in range(VMAS_RAYS):
            own[VMAS_OWN_FEATURES + k] = 0.0
    for i in range(n_agents):
        for j in range(i):
            dx, dy = position[env, j, 0] - position[env, i, 0], position[env, j, 1] - position[env, i, 1]
            squared = dx * dx + dy * dy
            if squared < (VMAS_RANGE + VMAS_RADIUS) ** 2:
                touch = 1.0 if squared <= (2.0 * VMAS_RADIUS) ** 2 else 0.0
                touching[i] += touch
                touching[j] += touch
                _vmas_see(dx, dy, observations[env, i, lidar:], observations[env, j, lidar:])


@kernel
def _vmas_hear(env, position, velocity, reach, scratch, neighbors, observations):
    """What the agents of one environment know of their neighbours by radio: where they are, and how they move."""
    _find_neighbors(env, position, reach, 1, 1.0, scratch.order, scratch.start, scratch.nearest, neighbors)
    scale = 1.0 / reach
    for i in range(neighbors.shape[1]):
        for k in range(neighbors.shape[2]):
            j = neighbors[env, i, k]
            features = observations[env, i, k * NEIGHBOR_FEATURES : (k + 1) * NEIGHBOR_FEATURES]
            if j == i:
                features[:] = 0.0
                continue
            _observe_neighbor(
                scale * (position[env, j, 0] - position[env, i, 0]),
                scale * (position[env, j, 1] - position[env, i, 1]),
                velocity[env, j, 0] - velocity[env, i, 0],
                velocity[env, j, 1] - velocity[env, i, 1],
                features,
            )


@inlined
def _vmas_observe(env, params, state, scratch, outputs):
    """What every agent observes, and how many others it touches."""
    position = state.agent_pos
    velocity = state.agent_vel
    neighbors = outputs.neighbors
    _vmas_look(env, position, velocity, state.goal_pos, scratch.touching, outputs.observations)
    if neighbors.shape[2] > 0:
        _vmas_hear(env, position, velocity, params.radio_range, scratch, neighbors, outputs.observations)


@kernel
def _to_goals(env, position, goal):
    """The sum of the distances to the goals, the largest of them, and how many agents have arrived."""
    total = 0.0
    farthest = 0.0
    arrived = 0.0
    for i in range(position.shape[1]):
        dx, dy = position[env, i, 0] - goal[env, i, 0], position[env, i, 1] - goal[env, i, 1]
        distance = math.sqrt(dx * dx + dy * dy)
        total += distance
        farthest = max(farthest, distance)
        arrived += 1.0 if distance < VMAS_RADIUS else 0.0
    return total, farthest, arrived


@inlined
def _vmas_reward(env, total, farthest, arrived, params, state, scratch, outputs):
    """Rewards and statistics of the step, after which `_to_goals` gives total, farthest and arrived."""
    totals = state.totals
    n_agents = outputs.rewards.shape[1]

    # Rewards
    progress = params.pos_shaping_factor * (scratch.distance[env] - total)
    final = params.final_reward if farthest < VMAS_GOAL_RADIUS else 0.0
    touching = 0.0
    for i in range(n_agents):
        outputs.rewards[env, i] = progress + final + params.agent_collision_penalty * scratch.touching[i]
        touching += scratch.touching[i] / n_agents
    collision = params.agent_collision_penalty * touching

    # Statistics
    totals[env, VMAS_STAT_RETURN] += progress + final + collision
    totals[env, VMAS_STAT_LENGTH] += 1.0
    totals[env, VMAS_STAT_COLLISIONS] += touching
    totals[env, VMAS_STAT_ARRIVED] = arrived / n_agents
    totals[env, VMAS_STAT_PROGRESS] += progress
    totals[env, VMAS_STAT_FINAL] += final
    totals[env, VMAS_STAT_COLLISION] += collision


@kernel
def _vmas_step(actions, params, state, scratch, outputs):
    position = state.agent_pos
    goal = state.goal_pos
    for env in range(actions.shape[0]):
        _vmas_move(env, actions, position, state.agent_vel, scratch.force)
        _vmas_observe(env, params, state, scratch, outputs)
        total, farthest, arrived = _to_goals(env, position, goal)
        _vmas_reward(env, total, farthest, arrived, params, state, scratch, outputs)
        scratch.distance[env] = total
        state.elapsed[env] += 1
        outputs.terminations[env] = arrived == actions.shape[1]
        outputs.truncations[env] = state.elapsed[env] >= params.max_steps
        if outputs.terminations[env] or outputs.truncations[env]:
            outputs.final_observations[env] = outputs.observations[env]
            outputs.final_neighbors[env] = outputs.neighbors[env]
            outputs.stats[env] = state.totals[env]
            outputs.stats[env, VMAS_STAT_COLLISIONS] /= state.totals[env, VMAS_STAT_LENGTH]
            _vmas_reset(env, state)
            _vmas_observe(env, params, state, scratch, outputs)
            scratch.distance[env], _, _ = _to_goals(env, position, goal)


class VmasNavigation(NativeVectorEnv):
    """The `navigation` scenario of VMAS 1.5.2 with its default arguments: discs on their way to goals of their own.

    For the same start and actions each step equals that of VMAS, to within its float32 rounding, but for one thing:
    VMAS also penalises two agents up to 0.005 apart if some other environment of the batch has the same two touching.
    Here, as in VMAS with one environment, only those that touch pay, and no environment depends on another.

    Agents are discs of radius 0.1 that push each other apart, goals are no obstacles, and there are no walls.

    Action (num_envs, n_agents, 2): the force on the agent along x and y, in [-1, 1]; more counts as the bound.

    Observation (num_envs, n_agents, 8 * n_neighbors + 18), in the frame of the environment:

        8 each    the `n_neighbors` (0 by default) nearest others within `radio_range`, nearest first: offset o along x
                  and y (in radio ranges), their velocity less the agent's own, the offset once more as its direction
                  o / (|o| + 0.05) and spacing (|o| - 0.1) / (|o| + 0.1), 1 for presence; all zeros for an absent one
        2     position
        2     velocity
        2     position minus goal
        12    lidar readings, 30 degrees apart, the first along x: 0.35 - (distance to the nearest other agent's edge
              along that ray), 0 if that is farther than 0.35; above 0.35, by up to 0.1, only inside another agent

    Reward of an agent: the sum of these terms.

        progress    pos_shaping_factor * the decrease of the distance to the goal, summed over all agents
        final       final_reward when all agents are within 0.05 of their goals
        collision   agent_collision_penalty for each other agent that it touches (centres at most 0.2 apart)

    Terminates when all agents are within 0.1 of their goals (so that few episodes see the final reward); truncates at
    `max_steps`, 100 as in TorchRL's tutorial, where VMAS has no limit.

    Starts at rest, positions and then goals uniform in [-1, 1]^2, all of them at least 0.25 apart. From about 22 agents
    on there is not always room for that. VMAS then searches for ever; here, of 1,000 places tried (100 once a goal has
    found none), the one farthest from all others is taken.

    Episode statistics:

        r, l             return, mean over agents, and length
        collisions       others touched, mean over agents and steps
        arrived          share of agents within 0.1 of their goals at the end
        reward_<term>    the reward terms, means over agents; they add up to r

    `reset(options={"agent_pos", "agent_vel", "goal_pos"})`, each (num_envs, n_agents, 2), gives any part of the start
    as it is; the rest, and the episodes after it, start at random.
    """

    stat_names = ("r", "l", "collisions", "arrived", *(f"reward_{term}" for term in VMAS_REWARD_TERMS))

    def __init__(
        self,
        num_envs=1,
        n_agents=3,
        max_steps=100,
        n_neighbors=0,
        radio_range=VMAS_RANGE,
        pos_shaping_factor=1.0,
        final_reward=0.01,
        agent_collision_penalty=-1.0,
        render_mode=None,
        first_env=0,
    ):
        n_agents = _integer("n_agents", n_agents, 1, 50)  # every pair is looked at, and more would not fit the square
        n_neighbors = _integer("n_neighbors", n_neighbors, 0, LARGEST_SIZE)
        self.params = VmasParams(
            max_steps=_integer("max_steps", max_steps, 1),
            radio_range=_number("radio_range", radio_range, 1e-6),
            pos_shaping_factor=_number("pos_shaping_factor", pos_shaping_factor),
            final_reward=_number("final_reward", final_reward),
            agent_collision_penalty=_number("agent_collision_penalty", agent_collision_penalty),
        )
        self.max_steps = self.params.max_steps
        neighbor_low = [*NEIGHBOR_LOW[:2], -np.inf, -np.inf, *NEIGHBOR_LOW[4:]] * n_neighbors
        neighbor_high = [1.0, 1.0, np.inf, np.inf, 1.0, 1.0, 1.0, 1.0] * n_neighbors
        low = np.float32(neighbor_low + [-np.inf] * VMAS_OWN_FEATURES + [0.0] * VMAS_RAYS)
        high = np.float32(neighbor_high + [np.inf] * VMAS_OWN_FEATURES + [VMAS_RANGE + VMAS_RADIUS] * VMAS_RAYS)
        super().__init__(
            num_envs,
            gym.spaces.Box(np.tile(low, (n_agents, 1)), np.tile(high, (n_agents, 1)), dtype=np.float32),
            gym.spaces.Box(-1.0, 1.0, (n_agents, 2), np.float32),
            render_mode,
            first_env,
        )
        shape = (num_envs, n_agents, 2)
        self.start_shapes = {"agent_pos": shape, "agent_vel": shape, "goal_pos": shape}
        self.buffers["neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        self.buffers["final_neighbors"] = np.zeros((num_envs, n_agents, n_neighbors), np.int64)
        if n_neighbors > 0:
            self.info_names = ("neighbors",)
        self.state = VmasState(
            agent_pos=np.zeros(shape),
            agent_vel=np.zeros(shape),
            goal_pos=np.zeros(shape),
            elapsed=np.zeros(num_envs, np.int64),
            totals=np.zeros((num_envs, len(self.stat_names))),
            rng=np.zeros((num_envs, 2), np.int64),
        )
        self.scratch = VmasScratch(
            force=np.zeros((n_agents, 2)),
            touching=np.zeros(n_agents),
            distance=np.zeros(num_envs),
            order=np.zeros(n_agents, np.int64),
            start=np.zeros(2, np.int64),
            nearest=np.zeros(n_neighbors),
        )

    def restart(self, start):
        for env in range(self.num_envs):
            _vmas_reset(env, self.state)
        for name, array in start.items():
            getattr(self.state, name)[...] = array

    def observe(self):
        for env in range(self.num_envs):
            _vmas_observe(env, self.params, self.state, self.scratch, Outputs(**self.buffers))
            self.scratch.distance[env], _, _ = _to_goals(env, self.state.agent_pos, self.state.goal_pos)

    def advance(self, actions):
        _vmas_step(actions, self.params, self.state, self.scratch, Outputs(**self.buffers))

    def draw(self, env, size=384):
        """Agents as discs, their goals as rings of the same colour, lidar ranges faint; size x size pixels.

        Radio links, if there are any, are thin lines.
        """
        import pygame

        position = self.state.agent_pos[env]
        goal = self.state.goal_pos[env]
        half = max(1.2, np.abs(np.concatenate([position, goal])).max() + 2.0 * VMAS_RADIUS)  # all of it is in view
        scale = size / half  # drawn at twice the size, then smoothed
        surface = pygame.Surface((2 * size, 2 * size))
        surface.fill("white")
        for x, y in scale * (position + half):
            pygame.draw.circle(surface, "gray88", (x, y), scale * VMAS_RANGE, 2)
        _draw_links(surface, scale * (position + half), self.buffers["neighbors"][env])
        for i, (spot, ring) in enumerate(zip(scale * (position + half), scale * (goal + half), strict=True)):
            color = pygame.Color(0)
            color.hsva = (360.0 * i / len(position), 85, 80, 100)
            pygame.draw.circle(surface, color, spot.tolist(), scale * VMAS_RADIUS)
            pygame.draw.circle(surface, color, ring.tolist(), scale * VMAS_RADIUS, 5)
        surface = pygame.transform.flip(pygame.transform.smoothscale(surface, (size, size)), False, True)  # y is up
        return pygame.surfarray.array3d(surface).swapaxes(0, 1).copy()


def homing_policy(envs, gain=16.0, damping=2.0, push=32.0, aside=4.0):
    """Push towards the goal, against the own velocity, away from what the lidar sees, and to the left of that way.

    All push at once, in proportion; what the lidar sees weighs 0 at the end of its range and 1 at no distance. Without
    `aside`, two that are in each other's way would stay there.
    """
    bearing = 2.0 * np.pi / VMAS_RAYS * np.arange(VMAS_RAYS)
    rays = np.stack([np.cos(bearing), np.sin(bearing)], axis=-1)  # (rays, 2)

    def act(observations, infos):
        own = observations[..., -VMAS_OWN_FEATURES - VMAS_RAYS :].astype(float)  # without those of neighbours
        velocity = own[..., 2:4]
        from_goal = own[..., 4:6]
        away = -own[..., VMAS_OWN_FEATURES:] @ rays / VMAS_RANGE  # (num_envs, n_agents, 2)
        left = np.stack([-away[..., 1], away[..., 0]], axis=-1)
        force = push * away + aside * left - gain * from_goal - damping * velocity
        return np.clip(force, -1.0, 1.0).astype(np.float32)

    return act


# ----------------------------------------------------------------------------------------------------------------------
# Baselines
# ----------------------------------------------------------------------------------------------------------------------
# A policy is a function (observations, infos) -> actions; `make_policy(envs)` returns one for a batch of environments,
# so that a policy with memory, or with randomness of its own, starts afresh for every evaluation.


def random_policy(envs, seed=0):
    """Actions drawn from the action space, uniformly where it has bounds."""
    space = batch_space(envs.single_action_space, envs.num_envs)  # a copy: seeding it leaves that of `envs` alone
    space.seed(seed)
    return lambda observations, infos: space.sample()


def baselines(env_id, **env_kwargs):
    """What a trained policy is measured against: {name: (make_policy, env_kwargs)}."""
    if env_id == "LidarNavigation":
        drivers = {"steering": steering_policy, "planning": planning_policy, "random": random_policy}
        return {name: (make_policy, env_kwargs) for name, make_policy in drivers.items()}
    if env_id == "VmasNavigation":
        return {"homing": (homing_policy, env_kwargs), "random": (random_policy, env_kwargs)}
    if env_id in LANDERS:
        return {"heuristic": (heuristic_policy, env_kwargs), "random": (random_policy, env_kwargs)}
    if env_id != "Swarm":
        return {"random": (random_policy, env_kwargs)}
    # Vicsek averages over all within the radius, here its 40 nearest; what is seen changes nothing in the physics.
    see_all = env_kwargs | {"n_neighbors": max(1, min(env_kwargs.get("n_agents", 10) - 1, 40))}
    rules = {"boids": (boids_policy, env_kwargs), "vicsek": (vicsek_policy, see_all)}
    if env_kwargs.get("energy_weight"):
        rules["morse"] = (morse_policy, env_kwargs)
    return rules | {"random": (random_policy, env_kwargs)}


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------

LONGEST_EPISODE = 100_000  # steps; what goes on for longer has no time limit, and may never end


def evaluate(make_policy, env_id, num_episodes, seed, /, record=False, **env_kwargs):
    """Run `num_episodes` episodes, one in each of as many environments; Gymnasium's on workers, where none is drawn.

    Returns (stats, rewards, frames): stats maps "r", "l" and the environment's metrics to (num_episodes,) arrays;
    rewards (length of the longest episode, num_episodes) is the mean reward over agents at each step, NaN once an
    episode has ended; frames are pictures of the first environment, empty unless `record`. RuntimeError after
    LONGEST_EPISODE steps.
    """
    num_workers = 0 if record or find_native(env_id) else None  # the rules ask native ones for their params
    envs = make_vec(env_id, num_episodes, num_workers, render_mode="rgb_array" if record else None, **env_kwargs)
    policy = make_policy(envs)
    observations, infos = envs.reset(seed=seed)
    stats = None
    rewards = []
    frames = []
    running = np.ones(num_episodes, bool)  # (num_episodes,), whose first episode still goes on
    while running.any():
        if len(rewards) == LONGEST_EPISODE:
            limit = "give it a time limit, as max_episode_steps among the arguments of a Gymnasium environment"
            raise RuntimeError(f"an episode of {env_id} did not end within {LONGEST_EPISODE:,} steps: {limit}")
        if record:
            frames.append(_as_rgb(envs.render()[0]))
        observations, reward, _, _, infos = envs.step(policy(observations, infos))
        reward = reward.reshape(num_episodes, -1).mean(axis=1)
        rewards.append(np.where(running, reward, np.nan))
        if "episode" in infos:
            ended = running & infos["_episode"]
            stats = stats or {name: np.zeros(num_episodes) for name in infos["episode"]}
            for name, values in infos["episode"].items():
                stats[name][ended] = values[ended]
            running &= ~ended
    envs.close()
    return stats, np.array(rewards), frames


def compare(policies, env_id, num_episodes, seed, /, folder=None, **env_kwargs):
    """Evaluate `policies` {name: make_policy} beside the baselines on the same episodes.

    Returns (scores, table): the mean return of each, and the whole comparison as Markdown, mean and standard deviation
    over episodes. With a `folder`, also draws `eval.png`, the reward through the episode.
    """
    entries = _contestants(policies, env_id, env_kwargs)
    results = {name: evaluate(make, env_id, num_episodes, seed, **kwargs) for name, (make, kwargs) in entries.items()}
    scores = {name: float(stats["r"].mean()) for name, (stats, _, _) in results.items()}
    names = next(iter(results.values()))[0]
    metrics = [
        name for name in names if name not in ("r", "l") and any(stats[name].any() for stats, _, _ in results.values())
    ]
    heads = ["policy", "return", "length", "reward per step", *metrics]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, (stats, _, _) in results.items():
        columns = [stats["r"], stats["l"], stats["r"] / stats["l"], *(stats[metric] for metric in metrics)]
        lines.append(f"| {name} | {' | '.join(f'{column.mean():.3f} +- {column.std():.3f}' for column in columns)} |")
    if folder is not None:
        try:
            _plot_rewards({name: rewards for name, (_, rewards, _) in results.items()}, f"{folder}/eval.png")
        except OSError as error:
            print(f"no eval.png: {error}")
    return scores, "\n".join(lines)


def _contestants(policies, env_id, env_kwargs):
    """{name: (make_policy, env_kwargs)} of the policies, first, and of the baselines, whose names are their own."""
    opponents = baselines(env_id, **env_kwargs)
    entries = {}
    for name, make_policy in policies.items():
        entries[f"{name} (trained)" if name in opponents else name] = (make_policy, env_kwargs)
    return entries | opponents


def film(policies, env_id, seed, path, captions=None, /, **env_kwargs):
    """A video of the first episode of each of `policies` {name: make_policy} and of the baselines, side by side.

    captions {name: text} stand beside the names. Where no picture can be drawn or written, it says so, and why.
    """
    _film(_contestants(policies, env_id, env_kwargs), captions or {}, env_id, seed, path, env_kwargs)


def record(make_policy, env_id, seed, path, /, **env_kwargs):
    """A video of one episode of one policy; otherwise as `film`."""
    _film({Path(path).stem: (make_policy, env_kwargs)}, {}, env_id, seed, path, env_kwargs)


def _film(entries, captions, env_id, seed, path, env_kwargs):
    path = Path(path)
    try:
        with contextlib.closing(make_vec(env_id, 1, num_workers=0, **env_kwargs)) as envs:
            metadata = envs.metadata
        if "rgb_array" not in metadata.get("render_modes", ()):
            raise ValueError(f"{env_id} draws no pictures")
        videos = {}
        for name, (make_policy, kwargs) in entries.items():
            _, _, frames = evaluate(make_policy, env_id, 1, seed, record=True, **kwargs)
            videos[f"{name}   {captions[name]}" if name in captions else name] = frames
        write_video(videos, str(path), fps=metadata.get("render_fps") or 25)
    except Exception as error:  # of whatever draws: a display, OpenGL, ffmpeg or a full disk may be missing
        path.unlink(missing_ok=True)
        reason = str(error).strip() or type(error).__name__
        print(f"no {path.name}: {reason.splitlines()[-1]}")


def _plot_rewards(curves, path):
    """Mean over episodes of the reward at every step, with a band of one standard deviation; {name: (steps, n)}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rewards in curves.items():
        mean = np.nanmean(rewards, axis=1)
        std = np.nanstd(rewards, axis=1)
        steps = np.arange(len(rewards))
        axes.plot(steps, mean, label=f"{name}: {np.nanmean(rewards):.3f}")
        axes.fill_between(steps, mean - std, mean + std, alpha=0.2)
    axes.set(xlabel="step of the episode", ylabel="reward per agent", title=f"{rewards.shape[1]} held-out episodes")
    axes.legend()
    figure.savefig(path, dpi=120)


def _as_rgb(picture):
    """A picture (height, width), or with 1, 3 or 4 channels, of integers to 255 or floats to 1, as RGB in uint8."""
    picture = np.asarray(picture)
    if picture.dtype.kind not in "buif" or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] > 4):
        raise ValueError(f"render returned {picture.dtype} {picture.shape}: it must be a picture (height, width, 3)")
    if picture.dtype.kind in "bf":
        picture = 255.0 * picture
    picture = np.clip(picture, 0, 255)
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.shape[2] in (2, 4):  # the last channel is opacity, shown on white
        opacity = picture[..., -1:] / 255.0
        picture = opacity * picture[..., :-1] + (1.0 - opacity) * 255.0
    return np.broadcast_to(picture, (*picture.shape[:2], 3)).astype(np.uint8)


def write_video(videos, path, fps=25, **options):
    """One mp4 of {caption: frames} side by side; one that ends early stands still until the last has ended.

    frames are pictures (height, width, 3), uint8, of which `fps` are shown in a second; `options` go to moviepy, as in
    codec="gif".
    """
    import pygame
    from moviepy import VideoClip

    pygame.font.init()
    font = pygame.font.Font(None, 26)

    def strip(seconds):
        step = round(seconds * fps)
        panels = []
        for caption, frames in videos.items():
            picture = frames[min(step, len(frames) - 1)]
            height, width = (size // 2 * 2 for size in picture.shape[:2])  # the codec wants even sides
            panel = pygame.Surface((width, height + 32))
            panel.fill("white")
            panel.blit(pygame.surfarray.make_surface(picture[:height, :width].swapaxes(0, 1)), (0, 32))
            pygame.draw.rect(panel, "gray50", (0, 32, width, height), 1)
            panel.blit(font.render(caption, True, "black"), (8, 7))
            panels.append(pygame.surfarray.array3d(panel).swapaxes(0, 1))
        return np.concatenate(panels, axis=1)

    longest = max(len(frames) for frames in videos.values())
    # One strip at a time: all of them may be gigabytes. Half a step more, because moviepy rounds the last one down.
    clip = VideoClip(strip, duration=(longest + 0.5) / fps)
    clip.write_videofile(path, fps=fps, audio=False, logger=None, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------
# What a script does before there is anything to train, the same for all. torch is imported where it is needed, here and
# in the next section, so that environments and their workers do without it.

LARGEST_SIZE = 2**20  # of anything of which there are arrays
ARGUMENT_RANGES = {
    "seed": (0, 2**32 - 1),
    "eval_every": (1, 2**62),
    "eval_episodes": (1, LARGEST_SIZE),
    "checkpoint_every": (1, 2**62),
    "num_envs": (1, LARGEST_SIZE),
    "num_groups": (1, LARGEST_SIZE),
    "group_size": (2, LARGEST_SIZE),
    "num_actors": (0, LARGEST_SIZE),
    "max_lag": (0, LARGEST_SIZE),
    "hidden_dim": (2, 2**14),
    "hops": (1, LARGEST_SIZE),
    "init_logstd": (-20, 5),
    "lasting_noise": (0, 1),
    "total_timesteps": (1, 2**62),
    "learning_rate": (1e-12, 1e12),
    "num_steps": (1, LARGEST_SIZE),
    "reward_scale": (1e-12, 1e12),
    "team_reward": (0, 1),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "hybrid_alpha": (0, 1e12),
    "hybrid_beta": (0, 1e12),
    "hybrid_clip": (1e-12, math.inf),
    "rnd_coef": (0, 1e12),
    "rnd_gamma": (0, 1),
    "num_minibatches": (1, LARGEST_SIZE),
    "update_epochs": (1, LARGEST_SIZE),
    "clip_coef": (1e-12, 1e12),
    "ent_coef": (0, 1e12),
    "vf_coef": (0, 1e12),
    "guess_coef": (0, 1e12),
    "kl_coef": (1e-4, 1),
    "kl_coef_target": (1e-12, 1e12),
    "kl_adjust": (1, 1e12),
    "ref_update_freq": (1, LARGEST_SIZE),
    "max_grad_norm": (1e-12, 1e12),
    "target_kl": (1e-12, 1e12),
}


def check_args(args, rows=None):
    """ValueError for an argument of a script outside its range; None, where that is a value, is inside.

    `rows`, if given, are what minibatches are drawn from, all alike in size, and of two steps or more.
    """
    for name, (low, high) in ARGUMENT_RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}: it must be from {low} to {high}")
    stages = split_stages(args.env_kwargs, args.train_kwargs)
    for kwargs in (args.env_kwargs, *stages, getattr(args, "eval_env_kwargs", {})):
        for name, value in kwargs.items():
            if isinstance(value, str) and value.lower() in ("true", "false"):  # a text, and so true in any case
                raise ValueError(f"{name} is {value!r}, a text: as a truth value it must be True or False")
    if "n_agents" in args.env_kwargs and hasattr(args, "n_agents"):
        raise ValueError(f"env_kwargs is {args.env_kwargs}: n_agents must be given by itself, as --n-agents")
    if args.stage_returns is not None:
        ends = len(stages) - 1  # of stages: the last one has none
        if ends == 0 or len(_stage_returns(args.stage_returns)) != ends:
            wanted = f"{ends} numbers, as in 5,12" if ends else "left out"
            given = f"stage_returns is {args.stage_returns!r}"
            raise ValueError(f"{given}: with {ends + 1} stages in train_kwargs it must be {wanted}")
    if rows:
        steps = args.num_steps * args.num_envs * getattr(args, "n_agents", 1)
        if rows % args.num_minibatches or steps == args.num_minibatches:
            allowed = f"it must divide {rows}, and leave two steps or more to a minibatch"
            raise ValueError(f"num_minibatches is {args.num_minibatches}: {allowed}")


def split_stages(env_kwargs, train_kwargs):
    """The environments' arguments in training, a dict for each stage: `env_kwargs`, but for `train_kwargs`.

    Among the latter a text such as "200,60,25" is the values in one stage after the other.
    """
    values = {}
    for name, value in train_kwargs.items():
        values[name] = [value]
        if isinstance(value, str) and "," in value:
            words = [word.strip() for word in value.split(",")]
            if "" in words:
                raise ValueError(f"train_kwargs is {train_kwargs}: {name} must have a value beside every comma")
            values[name] = [_value(word) for word in words]
    count = max((len(own) for own in values.values()), default=1)
    for name, own in values.items():
        if len(own) not in (1, count):
            raise ValueError(f"train_kwargs is {train_kwargs}: {name} must have {count} values, as others have, or one")
    return [env_kwargs | {name: own[stage % len(own)] for name, own in values.items()} for stage in range(count)]


def _value(text):
    """What a word of the command line is: an integer, a number, a truth value or a text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"True": True, "False": False}.get(text, text)


def _stage_returns(text):
    """[float] of "5,12"; [] of what is not numbers."""
    with contextlib.suppress(ValueError):
        returns = [float(word) for word in text.split(",")]
        return [] if any(math.isnan(value) for value in returns) else returns
    return []


class Stages(list):
    """Vectors of environments, one for each stage of training; as a context, closed at its end."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        for envs in reversed(self):  # each puts back the global generators as it found them
            envs.close()


@contextlib.contextmanager
def _closed_if_refused(envs):
    """Close environments if an exception leaves the block; one of theirs while they close must not hide it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            envs.close()
        raise


def make_all(args, num_envs, num_workers, env_kwargs, discrete_only=False, checked=False):
    """The vectors of environments to train in, one for each stage of args.train_kwargs.

    ValueError unless agents, however many, observe and act in every stage as in the task itself, which `env_kwargs`
    describes, and unless the script can be trained in it: one for single agents as `check_spaces` says, one for swarms
    whose policy passes messages where agents have neighbours. What an actor makes was `checked` by its learner.
    """
    native = find_native(args.env_id)  # first: its module may add it
    swarms = {name: make for name, make in NATIVE_ENVS.items() if "n_agents" in inspect.signature(make).parameters}
    if hasattr(args, "n_agents") and native not in swarms.values():
        allowed = f"one of many agents: {', '.join(swarms)}, or your own as 'module:id'; async_ppo.py trains one agent"
        raise ValueError(f"env_id is {args.env_id!r}: it must be {allowed}")
    stages = Stages()
    with _closed_if_refused(stages):
        for own in split_stages(env_kwargs, args.train_kwargs):
            stages.append(make_vec(args.env_id, num_envs, num_workers, **own))
        if checked:
            return stages
        if args.train_kwargs:
            task = make_vec(args.env_id, 1, num_workers=0, **env_kwargs)
            task.close()
            for own, envs in zip(split_stages(env_kwargs, args.train_kwargs), stages, strict=True):
                if _of_one_agent(envs) != _of_one_agent(task):
                    must = "agents must observe and act as without it"
                    raise ValueError(f"train_kwargs is {args.train_kwargs}: {must}, which they do not with {own}")
                all_share = getattr(args, "share_policy", True) and getattr(args, "share_critic", True)
                if envs.single_observation_space.shape != task.single_observation_space.shape and not all_share:
                    must = "agents with policies or critics of their own must be as many as without it"
                    raise ValueError(f"train_kwargs is {args.train_kwargs}: {must}, which they are not with {own}")
        if hasattr(args, "eval_env_id"):  # the scripts for single agents have it
            check_spaces(args, stages[0], discrete_only)
        elif args.policy != "mlp" and "neighbors" not in stages[0].info_names:
            raise ValueError(f"policy is {args.policy!r}: {args.env_id} reports no neighbours, so it must be 'mlp'")
        if getattr(args, "num_actors", 0) and not args.evaluate:
            for envs in stages:
                compile_kernels(envs)  # once, here, and not in every actor
    return stages


def _of_one_agent(envs):
    """(observation space, action space) of the first agent, or of the only one."""
    spaces = envs.single_observation_space, envs.single_action_space
    if envs.buffers["rewards"].ndim > 1:  # of many
        spaces = tuple(gym.spaces.Box(space.low[0], space.high[0], dtype=space.dtype) for space in spaces)
    return spaces


class _Output:
    """stdout or stderr: what cannot be written, because a pipe, a terminal or the disk is gone, is given up."""

    def __init__(self, stream):
        self.stream = stream or io.StringIO()  # None after 2>&-

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def parse_args(Args, doc):
    """The command line as an instance of a script's dataclass `Args`; `doc` is what --help says first.

    With --evaluate the saved model's arguments are the defaults: the same network and world but for what is given.
    """
    import tyro

    if not isinstance(sys.stdout, _Output):  # it is, where one process runs several scripts
        sys.stdout = _Output(sys.stdout)
        sys.stderr = _Output(sys.stderr)
    for flag in ("--env-kwargs", "--train-kwargs", "--eval-env-kwargs"):
        if sum(word.replace("_", "-") == flag for word in sys.argv) > 1:
            raise ValueError(f"{flag} is given twice: all of them belong behind one")
    description = doc.replace("\n", "\n ")
    args = tyro.cli(Args, description=description)
    if not args.evaluate:
        return args
    saved = load(args.evaluate)["args"]
    names = {field.name for field in dataclasses.fields(Args)}
    if set(saved) != names:
        others = sorted(set(saved) ^ names)
        whose = f"{args.evaluate} was saved by {saved.get('exp_name')!r}, another script or version"
        raise ValueError(f"{whose}: its arguments and those here differ in {', '.join(others)}")
    _check_modules(args, saved)
    default = saved | {name: {} for name in saved if name.endswith("env_kwargs")}
    default = Args(**default | {"init_from": None, "cuda": args.cuda, "stage_returns": None})
    default.train_kwargs = {}  # after Args has filled it: tyro lets the command line replace only an empty one
    args = tyro.cli(Args, description=description, default=default)
    if "eval_env_id" not in saved:
        args.env_kwargs = saved["env_kwargs"] | args.env_kwargs
        return args
    if (args.env_id, args.env_kwargs) != (saved["env_id"], {}):
        given = f"env_id is {args.env_id!r}, env_kwargs is {args.env_kwargs}"
        raise ValueError(f"{given}: with evaluate they must be left out; eval_env_id and eval_env_kwargs choose")
    args.env_kwargs = saved["env_kwargs"]
    if args.eval_env_id == saved["eval_env_id"]:
        args.eval_env_kwargs = saved["eval_env_kwargs"] | args.eval_env_kwargs
    return args


def _check_modules(args, saved):
    """A stranger's file must not choose what is imported: ValueError unless the command line names the module too."""
    names = ("env_id", "eval_env_id")
    given = {(getattr(args, name, None) or "").rpartition(":")[0] for name in names}
    for name in names:
        env_id = saved.get(name) or ""
        if ":" in env_id and env_id.rpartition(":")[0] not in given:
            flag = "--eval-env-id" if "eval_env_id" in saved else "--env-id"
            raise ValueError(
                f"{args.evaluate} asks for {env_id}, which runs that module: say {flag} {env_id} to allow it"
            )


def check_spaces(args, envs, discrete_only=False):
    """ValueError unless env_id, as made into `envs`, and eval_env_id are of one agent that observes a vector.

    Their actions must be discrete or, without `discrete_only`, real and bounded, and those of the two the same.
    """
    allowed = "discrete" if discrete_only else "discrete or bounded real"
    eval_envs = make_vec(args.eval_env_id, 1, num_workers=0, **args.eval_env_kwargs)
    with _closed_if_refused(eval_envs):
        for name, own in (("env_id", envs), ("eval_env_id", eval_envs)):
            observations = own.single_observation_space
            actions = own.single_action_space
            discrete = isinstance(actions, gym.spaces.Discrete)
            real = len(actions.shape) == 1 and actions.dtype.kind == "f" and actions.is_bounded()
            given = f"{name} is {getattr(args, name)!r}"
            if len(observations.shape) != 1 or not (discrete or (real and not discrete_only)):
                wanted = f"an environment of one agent, with vector observations and {allowed} actions"
                raise ValueError(f"{given}: it must be {wanted}, not {observations} and {actions}")
            same_shape = observations.shape == envs.single_observation_space.shape
            if not same_shape or actions != envs.single_action_space:
                raise ValueError(f"{given}: it must observe and act as {args.env_id} does")
            check_range(given, actions)
            said = own is eval_envs and args.eval_env_id == args.env_id
            if not said and own.spec is not None and own.spec.max_episode_steps is None:
                limit = "if its episodes may go on for ever, give it one, as --env-kwargs max_episode_steps 1000"
                print(f"{given}, which is registered without a time limit: {limit}")
    eval_envs.close()


def check_range(given, actions):
    """ValueError unless a squashed policy can reach every value of real `actions`; `given` says whose they are."""
    if isinstance(actions, gym.spaces.Box):
        with np.errstate(over="ignore"):
            span = actions.high - actions.low
        if not (np.isfinite(span) & (span > 0)).all():
            raise ValueError(f"{given}: low < high must hold in every action, and high - low be finite, not {actions}")


def setup(args):
    """(rank, world_size, device): which of how many processes this is in a torchrun, alone (0, 1), and where it trains.

    Seeds the global generators of Python and NumPy, which environments may draw from while they are made. Leaves the
    actors' cores to them. Starts no thread of torch's: workers have to be forked before.
    """
    import torch

    if getattr(args, "num_actors", 0):
        torch.set_num_threads(min(torch.get_num_threads(), max(1, count_cores() - args.num_actors)))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic CUDA asks for
    torch.set_deterministic_debug_mode("error" if args.torch_deterministic else "default")
    random.seed(args.seed)
    np.random.seed(args.seed)
    return _place(args)


def _place(args):
    import torch

    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    return rank, world_size, device


def make_seed(*keys):
    """One seed below the held-out ones from several non-negative integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(2))


def average(tensor):
    """The mean of a tensor over the processes of a torchrun, in place; alone, the tensor as it is."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def flatten(module):
    """One vector that holds all weights of a module, and in `grad` their gradients: its parameters become views of it.

    Clipping, averaging and Adam are then one operation each, which takes a tenth off an update of async_ppo.py's
    default command (benchmarks/update.py); with large minibatches, as ppo_swarm.py has them, little.
    """
    import torch

    parameters = list(module.parameters())
    weights = torch.nn.utils.parameters_to_vector(parameters).detach()
    weights.grad = torch.zeros_like(weights)
    torch.nn.utils.vector_to_parameters(weights, parameters)
    grads = weights.grad.split([parameter.numel() for parameter in parameters])
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.view_as(parameter)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

SIGNAL_SECONDS = 3.0  # a second SIGINT or SIGTERM so long after the first ends a run at once, without a checkpoint
FINITE = ("value_loss", "policy_loss", "entropy", "kl", "novelty", "std")  # losses with which a run must not go on
VALIDATION_SEED = 2**62  # evaluations during training; held out, because the seeds of training stay below
TEST_SEED = 2**62 + 1  # the closing comparison


def evaluate_model(args, agent, env_id, env_kwargs):
    """What --evaluate does: compare a saved model's policy with the baselines, in a new folder beside the model."""
    critic = {name: new for name, new in agent.state_dict().items() if name.startswith("critic")}
    agent.load_state_dict(load(args.evaluate)["model"] | critic)  # a critic of each agent's own need not fit
    name = f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = _make_folder(Path(args.evaluate).parent / name)
    policies = _policies(args.exp_name, agent.make_policy)
    scores, table = compare(policies, env_id, args.eval_episodes, TEST_SEED, folder, **env_kwargs)
    print(table)
    _film_comparison(args.exp_name, agent.make_policy, scores, env_id, env_kwargs, folder)
    print(f"In {folder}: {', '.join(sorted(os.listdir(folder)))}")


def _policies(name, make_policy):
    """What is compared with the baselines: the greedy policy, and the one that training saw."""
    greedy = f"{name} (greedy)" if name == "sampled" else name
    return {greedy: make_policy, "sampled": partial(make_policy, greedy=False)}


def _film_comparison(name, make_policy, scores, env_id, env_kwargs, folder):
    captions = {contestant: f"{score:.1f}" for contestant, score in scores.items()}
    film({name: make_policy}, env_id, TEST_SEED, folder / "eval.mp4", captions, **env_kwargs)


class _EventFile:
    """TensorBoard's writer, for which a full disk is no reason to end a training: said once, and tried again later."""

    def __init__(self, folder, first_step):
        self.folder = folder.resolve()  # wherever the process goes
        self.options = {"purge_step": first_step}  # drops what a process before this one had logged from there on
        self.writer = None
        self.failed = False

    @contextlib.contextmanager
    def open(self):
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.folder, **self.options)
                self.options = {}
            yield self.writer
        except OSError as error:
            with contextlib.suppress(AttributeError, OSError):  # there may be none yet
                self.writer.close()
            self.writer = None  # it would repeat the error for ever
            if not self.failed:
                print(f"\nnot logged, {self.folder}: {error}")
            self.failed = True

    def add_scalars(self, scalars, step):
        with self.open() as writer:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)

    def close(self):
        with self.open() as writer:
            writer.close()

    def has_test_scores(self):
        """Whether a process before this one has come as far as its last lines."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder))
        events.Reload()
        return any(tag.startswith("test/") for tag in events.Tags()["scalars"])


class Run:
    """A run's bookkeeping: its folder, logs, evaluations, checkpoints and the signals that end it.

        run = Run(args, agent.make_policy, total_steps, env_id, env_kwargs)  # a new folder, or an unfinished run's
        if run.checkpoint:
            with run.restoring(): ...                                       # put back what was given to `save`
        while ...:
            run.clock("rollout")
            run.add_episodes(infos["episode"], infos["_episode"])
            run.clock("update")
            run.log(step, scalars)
            run.evaluate(agent.state_dict())
            if run.checkpoint_due():
                run.save(state, own)
            if run.stopping:
                break
        run.finish(agent)

    It writes files and says when to stop. It never owns the loop, calls nothing of the algorithm but the policy that it
    evaluates, and touches no tensor that trains. make_policy(envs, greedy=True) makes a policy as `evaluate` takes it,
    which is evaluated in `env_id` with `env_kwargs`. In a torchrun every process has a Run, and rank 0 writes; each
    gets draws of its own, because making a Run seeds torch.

        folder       where the run's files are
        checkpoint   None, or a dict: what was last given to `save`, also by the process that ran before this one
        own          likewise, what this process alone gave; only where there is a checkpoint
        step         environment steps up to now; of swarms, here and everywhere, agent-steps
        stage        which of `make_all` to train in: the next one when its share of the steps begins, or after an
                     evaluation that args.stage_returns waits for
        stopping     whether a SIGINT or SIGTERM came, to any of the processes
    """

    def __init__(self, args, make_policy, total_steps, env_id, env_kwargs):
        import torch
        import torch.distributed as dist

        self.args = dataclasses.asdict(args)
        self.make_policy = make_policy
        if total_steps < 1:
            raise ValueError(f"total_timesteps is {args.total_timesteps}: it must be enough for one rollout")
        self.total_steps = total_steps
        self.episodes = {}  # since the last `log`, {metric: [value]}
        self.parts = {}  # of the iteration, {name: when it began}
        self.env_id = env_id
        self.env_kwargs = env_kwargs
        self.rank, self.world_size, self.device = _place(args)
        if args.cuda:
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("nccl" if args.cuda else "gloo")
        self.signals = []  # when SIGINT or SIGTERM came
        self.due = False  # whether `checkpoint_due`
        self.stopping = False
        for number in SIGNALS:  # before the run says that it is there
            signal.signal(number, self._take_signal)
        opened = [None, None]
        self.unlock = lambda: None
        if self.rank == 0:
            *opened, self.unlock = open_run(self.args, self.world_size)
        if self.world_size > 1:
            dist.broadcast_object_list(opened)
        self.folder, self.checkpoint = opened
        self.step = self.checkpoint["step"] if self.checkpoint else 0
        self.stage = self.checkpoint["stage"] if self.checkpoint else 0
        self.stages = split_stages({}, args.train_kwargs)
        if self.rank == 0:
            best = self._best_model()
            self.best_score = best.get("score", -math.inf) if best else -math.inf
            self._open_logs()
        self.first_step = self.last_step = self.step
        self.start_time = time.time()
        self.evaluation_seconds = 0.0
        # The ranks begin with the same weights and go on with draws of their own; torch reads only 32 bits of a seed
        torch.manual_seed((args.seed + self.rank * 0x9E3779B9) % 2**32)

    @property
    def own(self):
        return self.checkpoint["ranks"][self.rank]

    def make_seed(self, *keys):
        """A seed for what this process begins at this step, told from others by as many non-negative integers."""
        return make_seed(self.args["seed"], self.rank, self.step, *keys)

    @contextlib.contextmanager
    def restoring(self):
        """Around what puts a checkpoint back; after it torch's random numbers go on where they were.

        A checkpoint that does not fit is set aside: the same command then starts anew.
        """
        import torch

        try:
            yield
            torch.set_rng_state(self.own["rng"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            path = self.folder / "checkpoint.pt"
            aside = self.folder / "checkpoint-unfit.pt"
            if self.rank == 0:
                os.replace(path, aside)
            reason = f"{path} is not of this version of the scripts ({error!r})"
            raise SystemExit(f"{reason}: it is now {aside.name}, and the same command starts a new run") from error

    def clock(self, part):
        """A part of the iteration begins, the rollout or the update; `log` writes what each took."""
        self.parts[part] = time.time()

    def add_episodes(self, metrics, ended):
        """Remember metrics {name: (num_envs,)} of the episodes that `ended` (num_envs,); `log` writes their means."""
        for name, values in metrics.items():
            self.episodes.setdefault(name, []).extend(values[ended])

    def log(self, step, scalars):
        """Write the scalars {tag: value} of an iteration that ended with `step`.

        With them go the means over its episodes, and how long its parts took.
        """
        self.last_step = self.step
        self.step = step
        tags = {"r": "charts/episodic_return", "l": "charts/episodic_length"}
        means = {tags.get(name, f"episode/{name}"): np.mean(values) for name, values in self.episodes.items() if values}
        self.episodes = {}
        scalars = {tag: float(value) for tag, value in (means | scalars).items()}
        begins = [*self.parts.values(), time.time()]
        for part, (begin, end) in zip(self.parts, itertools.pairwise(begins), strict=True):
            scalars[f"charts/{part}_seconds"] = end - begin
            scalars[f"charts/{part}_share"] = (end - begin) / (begins[-1] - begins[0])
        self.parts = {}
        if len(self.stages) > 1:
            scalars["charts/stage"] = self.stage + 1
        if self.args["stage_returns"] is None:
            self._go_on_to(min(len(self.stages) * step // self.total_steps, len(self.stages) - 1))
        for tag in ("charts/episodic_return", *(f"losses/{name}" for name in FINITE)):
            self._check_finite(tag, scalars.get(tag, 0.0))
        if self.rank > 0:
            return
        # All costs included, evaluations too
        scalars["charts/SPS"] = (self.step - self.first_step) / (time.time() - self.start_time)
        self.events.add_scalars(scalars, step)
        self.progress.update(self.step - self.last_step)
        if "charts/episodic_return" in scalars:
            text = f"SPS {scalars['charts/SPS']:,.0f}, return {scalars['charts/episodic_return']:.2f}"
            self.progress.set_postfix_str(text, refresh=False)

    def evaluate(self, model):
        """If it is time: held-out episodes with the policy, without its noise and with it.

        Its weights, `model`, are kept if it is, without noise, the best so far.
        """
        import torch.distributed as dist

        if not self._is_due("eval_every"):
            return
        score = [self._evaluate(model) if self.rank == 0 else None]
        if self.args["stage_returns"] is not None:
            if self.world_size > 1:
                dist.broadcast_object_list(score)
            returns = _stage_returns(self.args["stage_returns"])
            reached = self.stage < len(returns) and score[0] >= returns[self.stage]
            if reached and self.step < self.total_steps:
                self._go_on_to(self.stage + 1)

    def _evaluate(self, model):
        start_time = time.time()
        episodes = self.args["eval_episodes"]
        stats, _, _ = evaluate(self.make_policy, self.env_id, episodes, VALIDATION_SEED, **self.env_kwargs)
        make_sampled = partial(self.make_policy, greedy=False)
        sampled, _, _ = evaluate(make_sampled, self.env_id, episodes, VALIDATION_SEED, **self.env_kwargs)
        scalars = {f"eval/{name}": values.mean() for name, values in stats.items()}
        scalars |= {f"eval/sampled_{name}": values.mean() for name, values in sampled.items()}
        self.events.add_scalars(scalars, self.step)
        score = float(stats["r"].mean())
        self._check_finite("the held-out return", score)
        content = {"args": self.args, "model": model, "score": score}
        best = score > self.best_score and save(content, self.folder / "model.pt")
        if best:
            self.best_score = score
            self._record(f"{self.step}.mp4")
        per_step = (stats["r"] / stats["l"]).mean()
        text = f"return {score:.2f}, {per_step:.3f} a step, length {stats['l'].mean():.0f}"
        text += f", with noise {sampled['r'].mean():.2f}"
        self.evaluation_seconds += time.time() - start_time
        self.progress.write(f"step {self.step:,}: held-out {text}{', the best so far' if best else ''}")
        return score

    def _go_on_to(self, stage):
        if stage != self.stage and self.rank == 0:
            values = ", ".join(f"{name} {value}" for name, value in self.stages[stage].items())
            self.progress.write(f"step {self.step:,}: stage {stage + 1} of {len(self.stages)}, {values}")
        self.stage = stage

    def checkpoint_due(self):
        """Whether it is time to `save`: now and then, at the end, and when a signal came."""
        import torch

        signals = torch.tensor(float(len(self.signals)), device=self.device)
        self.stopping = bool(average(signals) > 0)  # in all processes or in none
        self.due = self._is_due("checkpoint_every") or self.stopping
        return self.due

    def save(self, state, own=None):
        """Put a checkpoint together, and write it if `checkpoint_due` said so; else `write_checkpoint` may do it later.

        `state` is a dict of what all processes have in common, `own` of what each has alone. Found again as
        `run.checkpoint`, which has the items of `state`, and as `run.own`, with the state of torch's random numbers
        beside it.
        """
        import torch
        import torch.distributed as dist

        for name, weights in state["model"].items():
            if not torch.isfinite(weights).all():
                self._check_finite(f"a weight of {name}", math.nan)
        own = _without_numpy({"rng": torch.get_rng_state(), **(own or {})})
        ranks = [own] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(ranks, own)
        self.checkpoint = state | {"args": self.args, "step": self.step, "stage": self.stage, "ranks": ranks}
        if self.due:
            self.write_checkpoint()

    def write_checkpoint(self):
        if self.rank == 0 and self.checkpoint:
            with self.events.open() as writer:
                writer.flush()  # first, so that the curves reach at least as far as the checkpoint
            save(self.checkpoint, self.folder / "checkpoint.pt")

    def finish(self, agent):
        """Close the logs; after a complete training, compare the best weights, put into `agent`, with the baselines.

        In a torchrun this ends the process.
        """
        import torch.distributed as dist

        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)  # all is saved: what is left can be done again
        if self.rank == 0:
            self.progress.close()
            if self.step < self.total_steps:
                self.events.close()
                where = f"{self.step:,} of {self.args['total_timesteps']:,}"
                print(f"stopped at {where}; the same command goes on from there: {self.folder}")
            else:
                self._conclude(agent)
        self.unlock()
        if self.world_size > 1:
            dist.barrier()  # torchrun ends all if one fails, even on its way out: rank 0 has to have written its files
            dist.destroy_process_group()
            # A thread of gloo's that is left while Python shuts down may end the process with an error: be faster.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _best_model(self):
        """What `evaluate` saved last, also in the process before this one: it may be newer than the checkpoint."""
        try:
            return load(self.folder / "model.pt")
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"not the best model any more: {error}")
            return None

    def _conclude(self, agent):
        best = self._best_model()
        if best:
            agent.load_state_dict(best["model"])
        else:
            print(f"no model.pt in {self.folder}: what follows is the last policy, not the best one")
            save({"args": self.args, "model": agent.state_dict(), "score": math.nan}, self.folder / "model.pt")
        episodes = self.args["eval_episodes"]
        policies = _policies(self.args["exp_name"], self.make_policy)
        start_time = time.time()
        scores, table = compare(policies, self.env_id, episodes, TEST_SEED, self.folder, **self.env_kwargs)
        self.evaluation_seconds += time.time() - start_time
        print(f"\nThe best policy on {episodes} other held-out episodes:\n\n{table}\n")
        _film_comparison(self.args["exp_name"], self.make_policy, scores, self.env_id, self.env_kwargs, self.folder)
        if self.first_step < self.total_steps or not self.events.has_test_scores():
            self.events.add_scalars({f"test/{name}": score for name, score in scores.items()}, self.step)
        self.events.close()
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        files = ", ".join(sorted(os.listdir(self.folder)))
        seconds = time.time() - self.start_time
        share = self.evaluation_seconds / seconds
        print(f"{seconds / 60:.1f} minutes, {share:.0%} of them evaluations. In {self.folder}: {files}")

    def _open_logs(self):
        from tqdm import tqdm

        if self.args["track"]:
            import wandb

            name = re.sub(r"[^\w.-]", "_", self.folder.name)  # an env_id may hold a colon, which W&B refuses
            project = self.args["wandb_project_name"]
            wandb.init(project=project, config=self.args, sync_tensorboard=True, id=name, name=name, resume="allow")
        self.events = _EventFile(self.folder, first_step=self.step + 1)
        where = f"{self.step:,} of {self.args['total_timesteps']:,}: {self.folder}"
        print(f"resumed at {where}" if self.checkpoint else f"new, {where}")
        if not self.checkpoint:
            rows = "\n".join(f"| {name} | {value} |" for name, value in self.args.items())
            with self.events.open() as writer:
                writer.add_text("args", f"| argument | value |\n|---|---|\n{rows}")
            self._record("0.mp4")
        self.progress = tqdm(total=self.total_steps, initial=self.step, unit_scale=True)

    def _check_finite(self, what, value):
        if not math.isfinite(value):
            since = f"in the iteration from step {self.last_step:,} to step {self.step:,}"
            kept = f"what was saved before is kept in {self.folder}"
            raise FloatingPointError(f"{what} is {value} {since}: the training ends, and {kept}")

    def _record(self, name):
        if self.args["capture_video"]:
            record(self.make_policy, self.env_id, VALIDATION_SEED, self.folder / name, **self.env_kwargs)

    def _is_due(self, every):
        """Whether the last step went over a multiple of the argument `every`, or is the last of all."""
        return self.step // self.args[every] > self.last_step // self.args[every] or self.step >= self.total_steps

    def _take_signal(self, number, frame):
        """The first ends the run after the iteration. Jobs often get it twice: only a later one ends it at once."""
        now = time.monotonic()
        if self.signals and now - self.signals[0] > SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signals.append(now)


def _without_numpy(value):
    """Arrays as tensors, in dicts of dicts: what `load` takes from a file."""
    import torch

    if isinstance(value, dict):
        return {name: _without_numpy(item) for name, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def save(content, path):
    """Write beside it, then rename: whenever the process dies, `path` is whole, the old one or the new.

    Returns whether that went well; where not, say on a full disk, it says so, and the training need not end for it.
    """
    import torch

    data = io.BytesIO()
    torch.save(content, data)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return True
    except OSError as error:
        print(f"\nnot saved, {path}: {error}")
        temporary.unlink(missing_ok=True)
        return False


def load(path):
    """What `save` wrote, a dict with at least "args" and "model", its tensors on the CPU.

    weights_only: a file from a stranger holds tensors and plain values, and cannot run code. FileNotFoundError if there
    is none, ValueError if it is damaged or something else.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as file:  # torch writes a check sum of every part, and does not look at it
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"the check sum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: dict(content[name]) for name in ("args", "model")} | content
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or not a file of these scripts: {error!r}") from error


_locks = {}  # {folder: descriptor}, held by runs of this process


def lock(folder):
    """Make this process the one in a run's folder, as long as it lives; returns what gives the lock back, or None.

    None if another process has it. A run before, of this same process, has ended: its lock passes on.
    """
    import fcntl  # not on Windows

    folder = Path(folder).resolve()
    unlock = partial(_unlock, folder)
    unlock()
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # some file systems of networks have no locks: then nothing keeps two runs apart
        pass
    _locks[folder] = descriptor
    return unlock


def _unlock(folder):
    if folder in _locks:
        os.close(_locks.pop(folder))


def _leave_locks():
    """In a forked child: its copies would keep the locks of a caller that has ended."""
    for folder in list(_locks):
        _unlock(folder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)


def open_run(args, world_size):
    """(folder, checkpoint, unlock) of an unfinished run of exactly these arguments; checkpoint is None of a new one."""
    name = f"{args['env_id']}__{args['exp_name']}__"
    for path in sorted(Path("runs").glob(f"{glob.escape(name)}*/checkpoint.pt")):
        try:
            checkpoint = load(path)
            missing = {"ranks", "stage", "step"} - set(checkpoint)
            if missing:
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
        except (FileNotFoundError, ValueError) as error:
            print(f"not resumed, and left where it is: {error}")
            continue
        ranks = len(checkpoint["ranks"])
        others = [name for name in args if checkpoint["args"].get(name) != args[name]]
        if others:
            print(f"left alone, an unfinished run with other arguments ({', '.join(others)}): {path.parent}")
            continue
        if ranks != world_size:
            print(f"left alone, an unfinished run of {ranks} processes, where there are {world_size}: {path.parent}")
            continue
        unlock = lock(path.parent)
        if unlock and path.exists():
            return path.parent, load(path), unlock
        print(f"left alone, a run that another process has in hand: {path.parent}")
    folder = Path("runs") / f"{name}{args['seed']}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = _make_folder(folder)
    return folder, None, lock(folder)


def _make_folder(path):
    """A new folder at `path`, or with a number behind it where one process starts several runs in a second."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


# ----------------------------------------------------------------------------------------------------------------------
# Vectorizer
# ----------------------------------------------------------------------------------------------------------------------
# One contiguous slice of the environments per forked worker; actions, observations, rewards and flags lie in memory
# that all of them share. Two semaphores per worker, `go` and `done`, say whose turn it is to touch that memory. A
# semaphore orders memory on every machine (POSIX: what was written before a post is seen after the wait for it), where
# a plain flag would do so on x86 only, and as long as nobody sleeps on it it costs no system call. So both sides poll
# for a while, giving up their core in between, and then sleep.

CALLER_POLL_SECONDS = 2e-5  # about a wake-up; in a longer step the core of the caller is worth more to a worker
WORKER_POLL_SECONDS = 1e-3  # as long as a policy may take to answer; while a learner learns, workers sleep
CHECK_SECONDS = 0.5  # a sleeper looks this often whether the other side is still alive
CLOSE_SECONDS = 1.5  # for workers to end their step and close their environments
PATIENCE_SECONDS = 30.0  # a caller that waits for longer says for whom, once
POOL_AGENTS = 2000  # native agents stepped at once from which on workers clearly pay: benchmarks/vectorizer.py, part 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DEATHS = 3  # so many deaths of a stream's workers within DEATH_SECONDS are an error
DEATH_SECONDS = 60.0
READY, STEP, CALL, STOP = range(4)  # orders to the workers
CGROUP = "/sys/fs/cgroup"  # where a container finds its own; (quota, period) in version 2 and 1
CORE_QUOTAS = [
    (f"{CGROUP}/cpu.max", f"{CGROUP}/cpu.max"),
    (f"{CGROUP}/cpu/cpu.cfs_quota_us", f"{CGROUP}/cpu/cpu.cfs_period_us"),
]


class GymnasiumVectorEnv(gym.vector.VectorEnv):
    """`gymnasium.make` environments, stepped one after the other, behind the interface of NativeVectorEnv.

    Observations in floating point come as float32, integers as they are; infos of their own are dropped. Every
    environment is seeded by itself, from the seed given to `reset` and its index in the whole batch. So are NumPy's and
    Python's global generators, which some environments draw from; `close` puts back what they were.
    """

    autoreset_mode = AutoresetMode.SAME_STEP
    episode_info = True
    info_names = ()
    unseen_dim = 0
    has_state = False
    stat_names = ("r", "l")

    def __init__(self, env_id, num_envs, render_mode=None, first_env=0, **env_kwargs):
        try:
            name = env_id.rpartition(":")[2]  # of "module:id", whose module has been imported
            namespace, base, version = parse_env_id(name)
            if version is None and name not in gym.registry:  # the newest one, as `gymnasium.make` takes it
                name = get_env_id(namespace, base, find_highest_version(namespace, base))
            gym.spec(name)
        except (gym.error.Error, AttributeError, ImportError, TypeError, ValueError) as error:
            allowed = f"one of {sorted(NATIVE_ENVS)} or an id registered with Gymnasium"
            raise ValueError(f"env_id is {env_id!r}: it must be {allowed} ({error})") from error
        if render_mode not in (None, "rgb_array", "human"):
            raise ValueError(f"render_mode is {render_mode!r}: it must be None, 'rgb_array' or 'human'")
        self.env_id = env_id
        self.num_envs = num_envs
        self.first_env = first_env
        self.render_mode = render_mode
        self.callers_generators = None  # the states of NumPy's and Python's, once they are seeded here
        self.envs = []
        for env in range(num_envs):
            # One window is enough, and an environment told to render pays for it at every step.
            wanted = {} if render_mode is None or (render_mode == "human" and env > 0) else {"render_mode": render_mode}
            try:
                self.envs.append(gym.make(name, disable_env_checker=True, **wanted, **env_kwargs))
            except (TypeError, ValueError, AssertionError) as error:
                if not env_kwargs:
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"env_kwargs is {env_kwargs}: {env_id} refuses it ({error})") from error
        self.spec = self.envs[0].spec
        self.metadata = {**self.envs[0].metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        if not isinstance(space, gym.spaces.Box):
            raise ValueError(f"env_id is {env_id!r}, which observes {space}: only Box observations can be stepped")
        if not isinstance(self.single_action_space, gym.spaces.Box | gym.spaces.Discrete):
            allowed = "only Box and Discrete actions can be stepped"
            raise ValueError(f"env_id is {env_id!r}, which takes {self.single_action_space}: {allowed}")
        if space.dtype.kind == "f":
            space = gym.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
        self.single_observation_space = space
        self.observation_space = batch_space(space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.buffers = _make_buffers(num_envs, space, (), self.stat_names)
        self.returns = [0.0] * num_envs
        self.lengths = [0] * num_envs
        self.started = False

    def reset(self, *, seed=None, options=None):
        _check_open(self)
        seed = _valid_seed(seed, self.num_envs)
        options = None if options is None else dict(options)
        group = _pop_identical(options, seed) if options else 1
        env_seed = None
        if seed is not None and self.callers_generators is None:
            self.callers_generators = (np.random.get_state(), random.getstate())
        for i, env in enumerate(self.envs):
            if isinstance(seed, list):
                env_seed = seed[i]
            elif seed is not None:  # 32 bits: no environment refuses them
                own = np.random.SeedSequence(seed, spawn_key=(self.first_env + i,))
                first = np.random.SeedSequence(seed, spawn_key=((self.first_env + i) // group * group,))
                env_seed = int(first.generate_state(1)[0])
            if seed is not None:
                _seed_globals(env_seed)
            observation, _ = env.reset(seed=env_seed, options=options or None)
            self.buffers["observations"][i] = self._fitting(i, observation)
            if group > 1:
                env.unwrapped.np_random = np.random.default_rng(own)
            self.returns[i] = 0.0
            self.lengths[i] = 0
        if seed is not None:
            _seed_globals(self.first_env + 1, env_seed)  # after a start alike, other draws on every worker
        self._check_finite("observations")
        self.buffers["terminations"][...] = False
        self.buffers["truncations"][...] = False
        self.started = True
        return self.buffers["observations"].copy(), {}

    def step(self, actions):
        _check_steppable(self)
        self.proceed(_valid_actions(actions, self.action_space))
        return _collect(self)

    def proceed(self, actions):
        observations = self.buffers["observations"]
        rewards = self.buffers["rewards"]
        terminations = self.buffers["terminations"]
        truncations = self.buffers["truncations"]
        returns = self.returns
        lengths = self.lengths
        shape = observations.shape[1:]
        dtype = observations.dtype
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        # Integers for Discrete; for Box a fresh array, because an environment may keep the action that it was given.
        actions = actions.copy() if isinstance(self.single_action_space, gym.spaces.Box) else actions.tolist()
        for i, env in enumerate(self.envs):
            if not same_step and (terminations[i] or truncations[i]):  # in the last step
                observation, _ = env.reset()
                observations[i] = self._fitting(i, observation)
                rewards[i] = 0.0
                terminations[i] = False
                truncations[i] = False
                continue
            observation, reward, terminated, truncated, _ = env.step(actions[i])
            if not isinstance(reward, float):  # NumPy's float64 is one
                reward = self._one_number(i, reward)
            rewards[i] = reward
            terminations[i] = terminated
            truncations[i] = truncated
            returns[i] += reward
            lengths[i] += 1
            if terminated or truncated:
                self.buffers["final_observations"][i] = self._fitting(i, observation)
                self._check_finite("final_observations")
                self.buffers["stats"][i] = (returns[i], lengths[i])
                returns[i] = 0.0
                lengths[i] = 0
                if same_step:
                    observation, _ = env.reset()
            # What fits at a glance saves the call, a hundredth of a CartPole's step.
            if type(observation) is not np.ndarray or observation.shape != shape or observation.dtype is not dtype:
                observation = self._fitting(i, observation)
            observations[i] = observation
        self._check_finite("observations")
        self._check_finite("rewards")

    def _fitting(self, env, observation):
        """An observation as an array, unless storing it would change its shape or its numbers: then a ValueError."""
        observation = np.asarray(observation)
        space = self.single_observation_space
        if observation.shape == space.shape:
            given = observation.dtype
            wanted = space.dtype
            if given is wanted or (wanted.kind == "f" and given.kind in "fiub"):
                return observation
            if given.kind in "iub" and (observation.astype(wanted) == observation).all():
                return observation
        raise ValueError(f"{self._name(env)} observed {observation.dtype} {observation.shape}: its space is {space}")

    def _one_number(self, env, reward):
        number = np.asarray(reward)
        if number.size != 1 or number.dtype.kind not in "fiub":
            raise ValueError(f"{self._name(env)} gave the reward {reward!r}: it must be one number")
        return float(number.item())

    def _check_finite(self, name):
        """ValueError for the first environment with NaN or infinity in a buffer; all at once, which is cheap."""
        array = self.buffers[name]
        if array.dtype.kind == "f" and np.count_nonzero(np.isfinite(array)) < array.size:
            env = np.argwhere(~np.isfinite(array))[0, 0]
            raise ValueError(f"{self._name(env)} came to {name} of {array[env]}: they must be finite")

    def _name(self, env):
        return f"{self.env_id} (environment {self.first_env + env})"

    def get_state(self):
        raise NotImplementedError("Gymnasium environments cannot save their state; the native ones can")

    def set_state(self, state):
        raise NotImplementedError("Gymnasium environments cannot restore a state; the native ones can")

    def render(self):
        _check_open(self)
        if self.render_mode is None:
            raise ValueError("render_mode is None: give 'rgb_array' or 'human' to make_vec")
        if self.render_mode == "human":
            return self.envs[0].render()
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs):
        for env in self.envs:
            env.close()
        if self.callers_generators is not None:
            np.random.set_state(self.callers_generators[0])
            random.setstate(self.callers_generators[1])


class Shared(NamedTuple):
    """What a PoolVectorEnv and its workers have in common; inherited by the fork, never pickled."""

    make_slice: Callable
    slices: list  # of the environments, one per worker; likewise the semaphores and pipe ends below
    buffers: dict
    actions: np.ndarray
    pids: np.ndarray  # (num_workers,), 0 until the worker has started
    order: mmap.mmap  # one byte, for all workers
    go: list
    done: list
    channels: tuple  # the caller's ends of the pipes
    worker_channels: tuple
    owner: int  # process id of the caller


class PoolVectorEnv(gym.vector.VectorEnv):
    """`make_slice(num_envs, first_env=...)` environments in `num_workers` processes of a `multiprocessing.Pool`.

    Each worker is given one task, `_serve_slice`, that lasts until `close`. An exception in an environment is raised
    here, with the worker's traceback as its cause, and so is a worker's death; both close the pool. Workers leave by
    themselves when the caller is gone, and what their environments have started goes with them.
    """

    def __init__(self, make_slice, num_envs, num_workers):
        _check_may_fork(num_workers)
        probe = self.probe = make_slice(1)  # refuses bad arguments before anything starts
        compile_kernels(probe)  # once, here, and not in every worker
        if not isinstance(probe, NativeVectorEnv):
            probe.close()  # it may have a process, or a port, that those of the workers want
        self.num_envs = num_envs
        self.render_mode = probe.render_mode
        self.spec = probe.spec
        self.metadata = probe.metadata
        self.autoreset_mode = probe.autoreset_mode
        self.episode_info = probe.episode_info
        self.info_names = probe.info_names
        self.unseen_dim = probe.unseen_dim
        self.has_state = probe.has_state
        self.stat_names = probe.stat_names
        self.single_observation_space = probe.single_observation_space
        self.single_action_space = probe.single_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.buffers = {
            name: shared_array((num_envs, *array.shape[1:]), array.dtype) for name, array in probe.buffers.items()
        }
        context = multiprocessing.get_context("fork")
        bounds = [num_envs * worker // num_workers for worker in range(num_workers + 1)]
        channels, worker_channels = zip(*[context.Pipe() for _ in range(num_workers)], strict=True)
        self.shared = Shared(
            make_slice=make_slice,
            slices=[slice(first, last) for first, last in itertools.pairwise(bounds)],
            buffers=self.buffers,
            actions=shared_array(self.action_space.shape, self.action_space.dtype),
            pids=shared_array((num_workers,), np.int64),
            order=mmap.mmap(-1, 1),
            go=[context.Semaphore(0) for _ in range(num_workers)],
            done=[context.Semaphore(0) for _ in range(num_workers)],
            channels=channels,
            worker_channels=worker_channels,
            owner=os.getpid(),
        )
        self.started = False
        self.patient = True  # until it has said that it waits
        # A Ctrl-C or SIGTERM in the middle of this waits; in a worker, until `_start_worker` has said what to do with
        # it. The Pool's threads inherit the mask, and with it the workers that the Pool puts in the place of dead ones.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pool = context.Pool(num_workers, _start_worker, (self.shared,))
            self.tasks = [self.pool.apply_async(_serve_slice, (worker,)) for worker in range(num_workers)]
            # If nobody calls `close`, then at exit, before the Pool's own handler (priority 15) waits for its workers.
            self.stop_workers = Finalize(None, _stop_workers, (self.shared, self.tasks), exitpriority=20)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for channel in worker_channels:  # the workers alone hold these ends now, so that each closes with its worker
            channel.close()
        self._tell(READY)

    def reset(self, *, seed=None, options=None):
        _check_open(self)
        seed = _valid_seed(seed, self.num_envs)
        seeds = [seed[part] if isinstance(seed, list) else seed for part in self.shared.slices]
        own = dict(options or {})
        group = _pop_identical(own, seed)
        parts = [options] * len(self.tasks)
        if isinstance(self.probe, NativeVectorEnv):
            stagger = _pop_stagger(own)
            start = _valid_start(own, self.probe, self.num_envs)
            parts = [part | {"identical": group, "stagger": stagger} for part in self._split(start)]
        pairs = zip(seeds, parts, strict=True)
        self._tell(CALL, [methodcaller("reset", seed=own, options=part) for own, part in pairs])
        return self._observed()

    def step(self, actions):
        _check_steppable(self)
        self.shared.actions[...] = _valid_actions(actions, self.action_space)
        self._tell(STEP)
        return _collect(self)

    def get_state(self):
        """All that the future depends on, as a dict of arrays, num_envs first: the same for any number of workers."""
        self.probe.get_state()  # raises where a state cannot be had
        states = self._tell(CALL, [methodcaller("get_state")] * len(self.tasks))
        return {name: np.concatenate([state[name] for state in states]) for name in states[0]}

    def set_state(self, state):
        """Go back to what `get_state` returned; returns (observations, infos) as `reset` does."""
        state = _valid_state(state, self.probe.get_state(), self.num_envs)
        self._tell(CALL, [methodcaller("set_state", part) for part in self._split(state)])
        return self._observed()

    def render(self):
        if self.render_mode is None:
            raise ValueError("render_mode is None: give 'rgb_array' to make_vec")
        return sum(self._tell(CALL, [methodcaller("render")] * len(self.tasks)), ())

    def close_extras(self, **kwargs):
        if os.getpid() != self.shared.owner:  # a copy of this object in some other fork: not its workers
            return
        self.probe.close()
        self.stop_workers()
        # A worker that was killed while idle keeps a lock for ever that `terminate` may need: do not wait as long.
        ending = threading.Thread(target=self.pool.terminate, daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)
        for process in multiprocessing.active_children():
            if process.pid in self.shared.pids:
                _kill(process)
                process.join()

    def __reduce__(self):
        raise TypeError("these environments run in processes and cannot be copied: make them with num_workers=0")

    def __del__(self):
        if hasattr(self, "stop_workers") and not sys.is_finalizing():  # at exit, the exit handlers have done it
            self.close()

    def _tell(self, order, messages=()):
        """Give every worker an order, and wait. CALL comes with a message for each, and returns their answers."""
        _check_open(self)
        shared = self.shared
        self.told_at = time.monotonic()
        try:
            shared.order[0] = order
            for go in shared.go:
                go.release()
            for worker, message in enumerate(messages):
                with contextlib.suppress(ConnectionError):  # it died: `_receive` will say so
                    shared.channels[worker].send(message)
            answers = [self._receive(worker) for worker in range(len(messages))]
            for worker, done in enumerate(shared.done):
                _take(done, CALLER_POLL_SECONDS, partial(self._check_workers, worker))
        except BaseException:  # a Ctrl-C, too: half a step must not pass for a whole one
            self.close()
            raise
        return answers

    def _receive(self, worker):
        channel = self.shared.channels[worker]
        while not channel.poll(CHECK_SECONDS):
            self._check_workers(worker)
        try:
            return channel.recv()
        except (EOFError, ConnectionError):
            raise _death(self.shared.pids[worker]) from None

    def _check_workers(self, awaited):
        for task in self.tasks:
            if task.ready():  # before it was told to stop: it failed
                raise _rebuilt(*task.get())
        alive = {process.pid for process in multiprocessing.active_children()}
        for pid in self.shared.pids.tolist():
            if pid and pid not in alive:
                raise _death(pid)
        seconds = time.monotonic() - self.told_at
        if self.patient and seconds > PATIENCE_SECONDS:
            self.patient = False
            print(f"\nwaiting for worker {awaited}, process {self.shared.pids[awaited]}, since {seconds:.0f} seconds")

    def _split(self, arrays):
        """One dict per worker with its part of the arrays."""
        return [{name: array[part] for name, array in arrays.items()} for part in self.shared.slices]

    def _observed(self):
        self.started = True
        infos = {name: self.buffers[name].copy() for name in self.info_names}
        return self.buffers["observations"].copy(), infos


def _quieten_torch():
    """In a forked process, first of all: torch's threads did not survive, and it waits for them (pytorch#17199)."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _seed_globals(*keys):
    """Seed NumPy's and Python's global generators from several non-negative integers."""
    words = np.random.SeedSequence(keys).generate_state(8)
    np.random.seed(words)
    random.seed(words.tobytes())


@contextlib.contextmanager
def _household(caller, index):
    """In a worker, around all that its environments do: what they start ends with it, what they draw is its own.

    The worker is the leader of a process group, so that what its environments start can be ended as one; it leaves the
    group before. Only what goes into a session of its own, as a daemon does, escapes.
    """
    group = os.getpgid(0)
    os.setpgid(0, 0)
    multiprocessing.current_process().daemon = False  # which may have no children
    threading.Thread(target=_leave_with, args=(caller,), daemon=True).start()
    # For what is drawn before the first `reset`: a fork has copied the generators, the same to all workers.
    _seed_globals(np.random.randint(2**31), index)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(torch.initial_seed() % 2**32 + index)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # that group is gone, and the caller with it
            os.setpgid(0, group)
        with contextlib.suppress(OSError):  # nothing was started
            os.killpg(os.getpid(), signal.SIGKILL)


def _leave_with(caller):
    """End this worker's group when the caller is gone, whatever it is doing; in a thread of its own."""
    while os.getppid() == caller:
        time.sleep(CHECK_SECONDS)
    time.sleep(CLOSE_SECONDS)  # one that waits for the caller notices, and closes its environments
    with contextlib.suppress(OSError):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _kill(process):
    """Kill a worker, and what its environments have started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _kill_orphans(pid):
    """Kill what a dead worker's environments had started: its group, whose number no other process has meanwhile."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def _check_may_fork(num_workers):
    if num_workers and multiprocessing.current_process().daemon:
        reason = "this process is daemonic (a worker of a multiprocessing.Pool?) and may start no others"
        raise ValueError(f"workers are {num_workers}: {reason}, so they must be 0")


def _rebuilt(text, data):
    """An exception of a worker's: as it was raised there, if it can be pickled and had back, else a RuntimeError."""
    try:
        error = pickle.loads(data)
    except Exception:  # its class may take other arguments than it was made of
        error = None
    if not isinstance(error, Exception):  # a SystemExit, too: here it would end the program without a word
        error = RuntimeError(f"an environment on a worker raised {text.splitlines()[-1]}")
    error.__cause__ = multiprocessing.pool.RemoteTraceback(f"\n{text}")
    return error


def _start_worker(shared):
    """What every process of the Pool does first, whether a task awaits it or it only takes a dead worker's place."""
    global _inherited
    _quieten_torch()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to them and what they start, but the caller decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    _inherited = shared


def _serve_slice(worker):
    """A worker's one task: build its slice of the environments and follow orders until told to stop.

    Returns None, or what `_rebuilt` makes an exception of: the Pool would pickle it, and hang where that fails.
    """
    shared = _inherited
    part = shared.slices[worker]
    shared.pids[worker] = os.getpid()
    channel = shared.worker_channels[worker]
    go = shared.go[worker]
    done = shared.done[worker]
    for other in {*shared.channels, *shared.worker_channels} - {channel}:
        other.close()

    def check_caller():
        if os.getppid() != shared.owner:
            sys.exit()

    # A SIGTERM to the whole job must leave the caller its workers, so that it can save what they hold. An empty handler
    # instead of SIG_IGN, because a program that an environment starts would inherit that.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        make = partial(shared.make_slice, part.stop - part.start, first_env=part.start)
        with _household(shared.owner, worker), contextlib.closing(make()) as env:
            env.buffers = {name: array[part] for name, array in shared.buffers.items()}
            actions = shared.actions[part]
            while True:
                _take(go, WORKER_POLL_SECONDS, check_caller)
                order = shared.order[0]
                if order == STEP:
                    env.proceed(actions)
                elif order == CALL:
                    channel.send(channel.recv()(env))
                elif order == STOP:
                    return None
                done.release()
    except BaseException as error:
        check_caller()  # with nobody left to hear of it, leave quietly
        text = traceback.format_exc()
        try:
            return text, pickle.dumps(error)
        except Exception:
            return text, b""
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop_workers(shared, tasks):
    """End the tasks: tell the workers, give them time to close their environments, and kill those that did not."""
    shared.order[0] = STOP
    for go in shared.go:
        go.release()
    deadline = time.monotonic() + CLOSE_SECONDS
    alive = {process.pid: process for process in multiprocessing.active_children()}
    for pid, task in zip(shared.pids.tolist(), tasks, strict=True):
        if pid in alive:
            task.wait(max(0.0, deadline - time.monotonic()))
            if not task.ready():
                _kill(alive[pid])
        elif pid:
            _kill_orphans(pid)


class Published:
    """A vector of float32, version after version, and a stage, published by one process to those that it forks."""

    def __init__(self, size):
        self.slots = shared_array((2, size), np.float32)  # of even and odd versions
        self.latest = shared_array((2,), np.int64)  # version and stage

    @property
    def version(self):
        return int(self.latest[0])

    @property
    def stage(self):
        return int(self.latest[1])

    @stage.setter
    def stage(self, stage):
        self.latest[1] = stage

    def publish(self, vector, version):
        self.slots[version % 2] = vector
        self.latest[0] = version  # if seen before the vector, as ARM may, a reader takes some old numbers unawares

    def read(self, into):
        """Copy the newest vector into an array; returns its version."""
        version = -1
        while version != self.version:  # the writer uses the other slot, unless it is a version ahead
            version = self.version
            into[...] = self.slots[version % 2]
        return version


class StreamPool:
    """Forked workers that fill buffers without end, each at its own pace, while the caller uses what is full.

    produce(seed, todo, published) is what a worker does: a generator that takes each buffer of `todo`, fills it by the
    vector that is then `published`, a `Published`, and yields that vector's version. Its seed is make_seed(worker,
    starts), with the number of workers started before: one in a dead one's place has draws of its own. make_buffer()
    makes a buffer, in shared memory: every worker owns two, one to fill while the other waits for the caller. The lag
    of a buffer is how many versions later than the one that filled it the newest is; with more than `max_lag` it is
    filled anew, and with 0 there is one buffer to a worker. With 0 workers it does nothing.

    A worker that dies is replaced, an exception in one is raised by `take`. A process each and no Pool: what is forked
    in the place of a dead one is then forked by the caller in `take`, and not by a thread of the Pool's in the middle
    of something else.
    """

    def __init__(self, produce, num_workers, make_buffer, max_lag, make_seed):
        _check_may_fork(num_workers)
        self.produce = produce
        self.make_seed = make_seed
        self.max_lag = max_lag
        slots = 1 if max_lag == 0 else 2
        self.buffers = [[make_buffer() for _ in range(slots)] for _ in range(num_workers)]
        self.published = None
        self.arrived = collections.deque()  # (worker, slot, version), full
        self.taken = []  # the same, in the caller's hands
        self.starts = 0
        self.deaths = []  # when, those of the last DEATH_SECONDS
        self.discarded = 0  # buffers that were too old
        self.patient = True  # until it has said that it waits
        self.processes = {}  # by worker
        self.channels = {}  # likewise
        self.close = Finalize(self, _close_stream, (self.channels, self.processes), exitpriority=20)

    def start(self, vector, version, stage=0):
        """Fork the workers, with a first vector and stage to go by."""
        self.published = Published(len(vector))
        self.publish(vector, version)
        self.set_stage(stage)
        for worker in range(len(self.buffers)):
            self._fork(worker)

    def publish(self, vector, version):
        """What workers go by from now on; `version` is an integer one larger than that before."""
        self.published.publish(vector, version)

    def set_stage(self, stage):
        """Another integer that workers find in what is published: in which stage they are to work."""
        self.published.stage = stage

    def take(self, count, run=None):
        """(workers, buffers, lags) of the `count` buffers that were full first; they stay as they are until `release`.

        RuntimeError if a worker fails, or too many die, or if `run`, a `Run`, is told to stop and soon after there are
        still too few. Its checkpoint is written before.
        """
        try:
            self._await(count, run)
        except RuntimeError:
            if run is not None:
                run.write_checkpoint()
            raise
        workers = [worker for worker, _, _ in self.taken]
        buffers = [self.buffers[worker][slot] for worker, slot, _ in self.taken]
        lags = [self.published.version - version for _, _, version in self.taken]
        return workers, buffers, lags

    def _await(self, count, run):
        began = time.monotonic()
        deadline = math.inf
        while len(self.taken) < count:
            while not self.arrived:
                self._wait()
                now = time.monotonic()
                if run is not None and run.signals:
                    deadline = min(deadline, now + CLOSE_SECONDS)
                if now > deadline:
                    raise RuntimeError(f"stopped while waiting for {self._awaited(now - began)}")
                if self.patient and now - began > PATIENCE_SECONDS:
                    self.patient = False
                    print(f"\nwaiting for {self._awaited(now - began)}")
            worker, slot, version = self.arrived.popleft()
            if self.published.version - version <= self.max_lag:
                self.taken.append((worker, slot, version))
            else:
                self.discarded += 1
                self._give(worker, slot)

    def release(self):
        """Give back what was taken."""
        taken = self.taken
        self.taken = []
        for worker, slot, _ in taken:
            self._give(worker, slot)

    def _awaited(self, seconds):
        done = {worker for worker, *_ in (*self.arrived, *self.taken)}
        return f"workers {sorted(set(self.channels) - done)}, since {seconds:.0f} seconds"

    def _wait(self):
        """Until a worker has filled a buffer, failed or died, but for CHECK_SECONDS at most."""
        ready = multiprocessing.connection.wait(self.channels.values(), CHECK_SECONDS)
        # The channel of one that died does not break while a process that its environments started is there.
        dead = [
            worker
            for worker, process in self.processes.items()
            if process.exitcode is not None and self.channels[worker] not in ready
        ]
        for worker in [worker for worker, channel in self.channels.items() if channel in ready]:
            try:
                message = self.channels[worker].recv()
            except (EOFError, ConnectionError):
                self._replace(worker)
                continue
            if isinstance(message, str):
                raise RuntimeError(f"worker {worker} failed:\n{message}")
            slot, version = message
            self.arrived.append((worker, slot, version))
        for worker in dead:
            self._replace(worker)

    def _fork(self, worker):
        self.channels[worker], channel = multiprocessing.Pipe()
        callers_ends = list(self.channels.values())
        produce = partial(self.produce, self.make_seed(worker, self.starts))
        arguments = (produce, self.starts, self.buffers[worker], self.published, channel, callers_ends)
        context = multiprocessing.get_context("fork")
        self.processes[worker] = context.Process(target=_stream, args=(os.getpid(), *arguments), daemon=True)
        self.processes[worker].start()
        self.starts += 1
        channel.close()
        held = {slot for owner, slot, _ in (*self.arrived, *self.taken) if owner == worker}
        for slot in range(len(self.buffers[worker])):
            if slot not in held:
                self._give(worker, slot)

    def _replace(self, worker):
        process = self.processes[worker]
        process.join()
        _kill_orphans(process.pid)
        died = f"worker process {process.pid} died, with exit code {process.exitcode}"
        now = time.time()
        self.deaths = [at for at in self.deaths if now - at < DEATH_SECONDS] + [now]
        if len(self.deaths) >= DEATHS:
            raise RuntimeError(f"{died}: the last of {DEATHS} within {DEATH_SECONDS:.0f} seconds")
        print(f"\n{died}: what it was filling is lost, another takes its place")
        self.channels[worker].close()
        self._fork(worker)

    def _give(self, worker, slot):
        with contextlib.suppress(ConnectionError):  # it died: whoever takes its place is given all free slots
            self.channels[worker].send(slot)


def _stream(caller, produce, starts, buffers, published, channel, callers_ends):
    """A StreamPool's worker: for every slot that comes through the channel, fill it and send back (slot, version)."""
    _quieten_torch()
    # They go to all processes of a job, but the caller decides; SIG_IGN would stay with what an environment starts.
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    for end in callers_ends:
        end.close()  # each channel has to break when the caller is gone
    slot = None

    def todo():
        nonlocal slot
        while True:
            slot = channel.recv()
            yield buffers[slot]

    try:
        with _household(caller, starts):
            for version in produce(todo(), published):
                channel.send((slot, version))
    except BaseException:  # an EOFError, too: the caller has closed its end of the pipe
        with contextlib.suppress(ConnectionError):  # nobody is left to hear of it
            channel.send(traceback.format_exc())


def _close_stream(channels, processes):
    """End the workers: close the channels, give them time to close what they have, and kill those that did not."""
    for channel in channels.values():
        channel.close()
    deadline = time.monotonic() + CLOSE_SECONDS
    for process in processes.values():
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            _kill(process)
            process.join()
        _kill_orphans(process.pid)
        process.close()
    channels.clear()
    processes.clear()


def _death(pid):
    return RuntimeError(f"worker process {pid} died: it was killed (out of memory?), or crashed")


def _take(semaphore, poll_seconds, check):
    """Take a semaphore; while it is long in coming, `check` now and then whether it will come at all."""
    deadline = time.perf_counter() + poll_seconds
    while not semaphore.acquire(False):
        if time.perf_counter() < deadline:
            os.sched_yield()
        elif semaphore.acquire(True, CHECK_SECONDS):
            return
        else:
            check()


def count_cores():
    """How many cores this process may use: those that it is bound to, or fewer if its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for quota_file, period_file in CORE_QUOTAS:
        with contextlib.suppress(OSError, ValueError, IndexError):  # no such file; "max" is no quota
            quota = int(Path(quota_file).read_text().split()[0])
            period = int(Path(period_file).read_text().split()[-1])
            if quota > 0:
                cores = min(cores, math.ceil(quota / period))
    return cores


def compile_kernels(envs):
    """Compile or load the kernels that `envs` uses, so that processes forked afterwards have them."""
    if isinstance(envs, NativeVectorEnv):
        envs.reset(seed=0)
        envs.step(np.zeros(envs.action_space.shape, envs.action_space.dtype))
    one = np.ones(1, np.int64)
    _within(one, one, one)  # the check of discrete actions, Gymnasium's too


def make_fragment(envs, num_steps):
    """{name: array} in shared memory, for what an actor collects in num_steps steps of vector environments `envs`."""
    num_envs = envs.num_envs
    obs_shape = envs.single_observation_space.shape
    action_dtype = np.int64 if isinstance(envs.single_action_space, gym.spaces.Discrete) else np.float32
    sizes = {
        "obs": ((num_steps + 1, num_envs, *obs_shape), np.float32),  # the last ones begin the next fragment
        "final_obs": ((num_steps, num_envs, *obs_shape), np.float32),  # valid where an episode ended
        "actions": ((num_steps, num_envs, *envs.single_action_space.shape), action_dtype),
        "logprobs": ((num_steps, num_envs), np.float32),
        "rewards": ((num_steps, num_envs), np.float32),
        "terminations": ((num_steps, num_envs), bool),
        "truncations": ((num_steps, num_envs), bool),
        "stats": ((num_steps, num_envs, len(envs.stat_names)), np.float64),  # of the episodes that ended
    }
    return {name: shared_array(shape, dtype) for name, (shape, dtype) in sizes.items()}


def shared_array(shape, dtype):
    """Zeros in memory that this process shares with those that it will fork."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))  # anonymous: gone with the last to hold it
    return np.frombuffer(memory, dtype, count).reshape(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------------------------------
# One native environment alone, for libraries that step it so: `gymnasium.make("CleanSwarm/LunarLander-v0")`, of one
# agent, and `parallel_env("Swarm")`, of many. `gymnasium.make_vec` of these ids is the `make_vec` of this file, by the
# conventions of Gymnasium's own vector environments.

SINGLE_AGENT = ("LunarLander", "DenseLunarLander", "SparseLunarLander")


class NativeEnv(gym.Env):
    """A native environment as a `gymnasium.Env`: an episode that has ended stays so until `reset`.

    The same seed and actions give the same trajectory as in `make_vec(env_id, 1)`, whose next episode is what `reset`
    without a seed returns. Nothing has the axis of num_envs, the arrays in `options` neither. The info of an episode's
    last step also holds the metrics of the episode, but "r" and "l", which Gymnasium's RecordEpisodeStatistics adds.
    After that step `render` shows the state before it: the kernels leave none between it and the next episode.
    """

    metadata = {"render_modes": NativeVectorEnv.metadata["render_modes"], "render_fps": 50}  # the landers'

    def __init__(self, env_id, render_mode=None, **env_kwargs):
        self.envs = make_vec(env_id, 1, 0, render_mode, AutoresetMode.SAME_STEP, True, **env_kwargs)
        self.metadata = {name: self.envs.metadata[name] for name in self.metadata}
        self.render_mode = render_mode
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space
        self.next_start = None  # once an episode has ended, the state at the start of the next

    def reset(self, *, seed=None, options=None):
        options = dict(options or {})
        shapes = self.envs.start_shapes
        for name in set(options) & set(shapes):
            array = _array(f"options[{name!r}]", options[name], shapes[name][1:], np.float64)
            options[name] = array.reshape(shapes[name])
        if self.next_start is not None:
            observations, infos = self.envs.set_state(self.next_start)
        if self.next_start is None or seed is not None or options:
            observations, infos = self.envs.reset(seed=seed, options=options)
        self.next_start = None
        super().reset(seed=seed)  # for `np_random`, which wrappers may draw from
        if self.render_mode == "human":
            self.render()
        return observations[0], {name: values[0] for name, values in infos.items()}

    def step(self, action):
        if self.next_start is not None:
            raise gym.error.ResetNeeded("step after the end of the episode: reset first")
        before = None if self.render_mode is None else self.envs.get_state()
        observations, rewards, terminations, truncations, infos = self.envs.step([action])
        metrics = {}
        if terminations[0] or truncations[0]:
            self.next_start = self.envs.get_state()
            if before is not None:
                self.envs.set_state(before)
            metrics = {name: float(value) for name, (value,) in infos["episode"].items() if name not in ("r", "l")}
            observations = infos["final_obs"]
            infos = infos["final_info"]
        if self.render_mode == "human":
            self.render()
        info = {name: values[0] for name, values in infos.items()} | metrics
        return observations[0], rewards[0].tolist(), bool(terminations[0]), bool(truncations[0]), info

    def render(self):
        if self.render_mode is None:  # no error in Gymnasium either: skrl calls it in every step
            gym.logger.warn("render_mode is None: nothing is drawn without 'rgb_array' or 'human'")
            return None
        pictures = self.envs.render()
        return None if pictures is None else pictures[0]

    def close(self):
        self.envs.close()


def _make_registered(env_id, num_envs, max_episode_steps=None, **kwargs):
    """What `gymnasium.make_vec` calls; `gymnasium.make` honours `max_episode_steps` by itself."""
    if max_episode_steps is not None:
        kwargs["max_steps"] = min(max_episode_steps, kwargs.get("max_steps", max_episode_steps))
    return make_vec(env_id, num_envs, **{"autoreset_mode": AutoresetMode.NEXT_STEP, "episode_info": False} | kwargs)


def _register(name, reward_threshold, **kwargs):
    if f"CleanSwarm/{name}-v0" not in gym.registry:  # it may be, when a notebook reloads this file
        gym.register(
            f"CleanSwarm/{name}-v0",
            entry_point=f"{__name__}:NativeEnv",
            vector_entry_point=f"{__name__}:_make_registered",
            reward_threshold=reward_threshold,
            kwargs=kwargs,
        )


# From a return of 200 on, Gymnasium calls its lander solved; SparseLunarLander gives as much for coming to rest.
_register("LunarLander", 200.0, env_id="LunarLander")
_register("LunarLanderContinuous", 200.0, env_id="LunarLander", continuous=True)
_register("DenseLunarLander", 200.0, env_id="DenseLunarLander")
_register("SparseLunarLander", 200.0, env_id="SparseLunarLander")


def parallel_env(env_id, render_mode=None, **env_kwargs):
    """A native environment of many agents as a `pettingzoo.ParallelEnv`, of "agent_0", "agent_1", ...

    All agents end together. What `NativeEnv` promises holds here too; the metrics are in the info of every agent, and 0
    there until the episode ends, because TorchRL wants the same infos in every step. `state` is all observations.
    """
    multi_agent = sorted(set(NATIVE_ENVS) - set(SINGLE_AGENT))
    if env_id not in multi_agent:
        raise ValueError(f"env_id is {env_id!r}: it must be one of {multi_agent}")
    try:
        from pettingzoo import ParallelEnv
    except ImportError as error:
        raise ImportError("parallel_env needs PettingZoo: pip install pettingzoo") from error

    class NativeParallelEnv(ParallelEnv):
        def __init__(self):
            self.env = NativeEnv(env_id, render_mode, **env_kwargs)
            self.metadata = {"name": env_id, **self.env.metadata}
            self.render_mode = render_mode
            observations = self.env.observation_space  # (n_agents, obs_dim)
            actions = self.env.action_space  # (n_agents, act_dim)
            self.state_space = gym.spaces.Box(observations.low.ravel(), observations.high.ravel())
            self.observations = None  # the last ones
            self.no_metrics = dict.fromkeys(self.env.envs.stat_names[2:], 0.0)  # after "r" and "l"
            self.agents = []
            self.possible_agents = [f"agent_{i}" for i in range(len(observations.low))]
            self.observation_spaces = self.by_agent(map(gym.spaces.Box, observations.low, observations.high))
            self.action_spaces = self.by_agent(map(gym.spaces.Box, actions.low, actions.high))

        def __reduce__(self):  # pickle would not find a class inside a function
            return partial(parallel_env, env_id, render_mode, **env_kwargs), (), self.__dict__

        def observation_space(self, agent):
            return self.observation_spaces[agent]

        def action_space(self, agent):
            return self.action_spaces[agent]

        def by_agent(self, values):
            return dict(zip(self.possible_agents, values, strict=True))

        def infos_by_agent(self, info):
            info = self.no_metrics | info

            def of_agent(i):
                return {name: value if np.isscalar(value) else value[i] for name, value in info.items()}

            return self.by_agent(map(of_agent, range(len(self.possible_agents))))

        def state(self):
            if self.observations is None:
                raise gym.error.ResetNeeded("state before reset: reset first")
            return self.observations.flatten()

        def reset(self, seed=None, options=None):
            options = dict(options or {})
            for name in set(options) - set(self.env.envs.start_shapes):  # no error: PettingZoo's own tests give some
                warnings.warn(f"options[{name!r}] is not for {env_id}: ignored", stacklevel=2)
                del options[name]
            self.observations, info = self.env.reset(seed=seed, options=options)
            self.agents = list(self.possible_agents)
            return self.by_agent(self.observations.copy()), self.infos_by_agent(info)

        def step(self, actions):
            agents = self.agents  # none before `reset` or after the end, which `self.env` refuses
            if not (agents or actions or self.observations is None):
                return {}, {}, {}, {}, {}  # nobody is left, and nobody acts
            if agents and set(actions) != set(agents):
                raise ValueError(f"actions are for {list(actions)}: they must be for {agents}")
            actions = [self.action_of(agent, actions) for agent in agents]
            self.observations, rewards, *ends, info = self.env.step(actions)
            if any(ends):
                self.agents = []
            ends = [dict.fromkeys(agents, end) for end in ends]
            observations = self.by_agent(self.observations.copy())
            return observations, self.by_agent(rewards), *ends, self.infos_by_agent(info)

        def action_of(self, agent, actions):
            shape = self.action_spaces[agent].shape
            try:
                return np.reshape(actions[agent], shape)
            except (TypeError, ValueError):
                raise ValueError(f"actions[{agent!r}] is {actions[agent]!r}: it must have {shape} numbers") from None

        def render(self):
            return self.env.render()

        def close(self):
            self.env.close()

    return NativeParallelEnv()


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------


def _integer(name, value, low, high=2**31 - 1):
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        allowed = f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}: it must be an integer, {allowed}")
    return int(value)


def _number(name, value, low=-1e6, high=1e6):
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a finite number")
    if not low <= value <= high:
        allowed = f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value!r}: it must be {allowed}")
    return float(value)


def _valid_rooms(rooms, width, height):
    """Columns and rows of rooms, from a text like "3x2"; 0 is one room, the whole arena."""
    if isinstance(rooms, numbers.Integral) and not isinstance(rooms, bool) and rooms == 0:
        return 1, 1
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", rooms) if isinstance(rooms, str) else None
    if not found:
        raise ValueError(f"rooms is {rooms!r}: it must be 0, or columns and rows like '3x2'")
    columns, rows = map(int, found.groups())
    if min(width / columns, height / rows) < LIDAR_ROOM_SIDE:
        size = f"{width / columns:.3g} x {height / rows:.3g} m"
        raise ValueError(f"rooms is {rooms!r}: they are {size}, and must be at least {LIDAR_ROOM_SIDE} m each way")
    if columns * rows > LIDAR_MOST_ROOMS:
        raise ValueError(f"rooms is {rooms!r}: there can be at most {LIDAR_MOST_ROOMS}")
    return columns, rows


def _array(name, value, shape, dtype):
    try:
        array = np.asarray(value, dtype=dtype)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: it must be an array of numbers of shape {shape}") from None
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}: it must be {shape}")
    if np.count_nonzero(np.isfinite(array)) < array.size:  # several times faster than all()
        raise ValueError(f"{name} holds NaN or infinity: every entry must be finite")
    return np.ascontiguousarray(array)


def _valid_mode(mode):
    for allowed in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        if mode in (allowed, allowed.value):
            return allowed
    raise ValueError(f"autoreset_mode is {mode!r}: it must be AutoresetMode.SAME_STEP or NEXT_STEP")


def _valid_actions(actions, space):
    """The actions of a whole batch as an array; a ValueError names what is wrong with them."""
    box = isinstance(space, gym.spaces.Box)
    if box and space.dtype.kind == "f":
        return _array("actions", actions, space.shape, space.dtype)
    try:
        actions = np.asarray(actions)
    except ValueError:
        raise ValueError(f"actions are {actions!r}: they must be integers {space.shape}") from None
    if actions.dtype.kind not in "iu" or actions.shape != space.shape:
        raise ValueError(f"actions are {actions.dtype} {actions.shape}: they must be integers {space.shape}")
    if not box and _within(np.ascontiguousarray(actions, np.int64), space.start, space.nvec):
        return actions
    low, high = (space.low, space.high) if box else (space.start, space.start + space.nvec - 1)
    outside = np.argwhere((actions < low) | (actions > high))
    if len(outside):
        at = tuple(outside[0].tolist())
        raise ValueError(f"actions{list(at)} is {actions[at]}: it must be an integer from {low[at]} to {high[at]}")
    return actions


@kernel
def _within(actions, start, count):
    """Whether each is one of `count` integers from `start` on; NumPy would take as long as the physics of a lander."""
    outside = 0
    for i in range(actions.size):
        outside += not 0 <= actions.flat[i] - start.flat[i] < count.flat[i]
    return outside == 0


def _valid_start(options, envs, num_envs):
    """The arrays in `options` that give a start, of the shapes and within the bounds that `envs` names."""
    unknown = set(options) - set(envs.start_shapes)
    if unknown:
        raise ValueError(f"options has {sorted(unknown)}: it may hold {sorted(envs.start_shapes)}")
    start = {}
    for name, value in options.items():
        shape = (num_envs, *envs.start_shapes[name][1:])
        given = start[name] = _array(f"options[{name!r}]", value, shape, np.float64)
        low, high = envs.start_bounds.get(name, (-math.inf, math.inf))
        outside = np.argwhere((given < low) | (given > high))
        if len(outside):
            at = tuple(outside[0].tolist())
            allowed = f"from {low:g} to {np.broadcast_to(high, shape)[at]:g}"
            raise ValueError(f"options[{name!r}]{list(at)} is {given[at]:g}: it must be {allowed}")
    return start


def _valid_state(state, like, num_envs):
    """The arrays in `state`, of the names, and for each environment the shapes and types, of those in `like`."""
    if set(state) != set(like):
        raise ValueError(f"state has {sorted(state)}: it must hold {sorted(like)}")
    return {
        name: _array(f"state[{name!r}]", state[name], (num_envs, *array.shape[1:]), array.dtype)
        for name, array in like.items()
    }


def _valid_seed(seed, num_envs):
    """None, a seed, or a list of seeds, one for each environment."""
    if isinstance(seed, list | tuple):
        if len(seed) != num_envs:
            raise ValueError(f"seed is {seed}: a list must have one for each of {num_envs} environments")
        return [_integer("seed", own, 0, 2**63 - 1) for own in seed]
    return None if seed is None else _integer("seed", seed, 0, 2**63 - 1)


def _pop_identical(options, seed):
    """How many environments in a row are to start alike."""
    identical = options.pop("identical", False)
    group = 2**62 if identical is True else identical
    if not isinstance(group, numbers.Integral) or group < 0 or (group > 1 and not isinstance(seed, int)):
        allowed = "True, False or the size of a group, and needs one seed"
        raise ValueError(f"options['identical'] is {identical!r}: it must be {allowed}")
    return max(int(group), 1)


def _pop_stagger(options):
    """Whether the first episodes are to begin at different points of their time."""
    stagger = options.pop("stagger", False)
    if not isinstance(stagger, bool):
        raise ValueError(f"options['stagger'] is {stagger!r}: it must be True or False")
    return stagger


def _check_open(envs):
    if envs.closed:
        raise gym.error.ClosedEnvironmentError("these environments are closed: make new ones")


def _check_steppable(envs):
    _check_open(envs)
    if not envs.started:
        raise gym.error.ResetNeeded("step before reset: reset first")


# ----------------------------------------------------------------------------------------------------------------------
# Lunar Lander
# ----------------------------------------------------------------------------------------------------------------------
# Gymnasium's LunarLander-v3 without Box2D. The kernels do what Box2D 2.3 does for this one scene, three bodies on two
# joints above ten edges, operation by operation in its order and in its float32, so that the same draws give the same
# flight. Each names the part of Box2D that it stands for. The ground does not move: its terms are left out throughout.
#
# The velocity iterations cost the most, so landers go through them side by side, one in each of LANDER_LANES lanes. One
# step, from the top; callees are indented, and a function that is called in two places is described at the first:
#
#     _lander_step                    hands out the lanes until every environment has been through one
#         _lander_begin               in a new episode: the bodies at rest in their places
#         _lander_engines             wind (_lander_gust), and the engines' impulses on the lander (_lander_thrust)
#         _lander_load                the beginning of b2World::Step, then the lander goes into its lane:
#             _contact_update_all     where a body touches the ground: _contact_update for each edge in reach
#                                     (_body_edges, _body_outline, _contact_manifold, _contact_clip)
#             _contact_prepare        the effective masses of a contact
#             _contact_warm_start     the impulses of the last step once more, as a first guess
#             _joint_prepare          the effective masses of a joint, its limit, and its first guess
#         _lander_iterate             180 velocity iterations, in all lanes at once:
#             _joint_velocity         the motor of a leg, then its limit and hinge together
#             _contact_velocity       friction (_contact_friction), then what keeps the body out of the ground
#                                     (_contact_normal, or _contact_normal_single where no contact has two points)
#         _lander_unload              out of the lane, and the rest of b2World::Step:
#             _body_move              the bodies go where their velocities take them
#             _contact_position       up to 60 position iterations: bodies out of the ground ...
#             _joint_position         ... and legs back onto their hinges
#             _impact_solve           a body that hit the ground on its way goes back to there, and on from there:
#                 _impact_time        when it hits an edge (_impact_distance, _impact_gap, _impact_gap_at)
#                                     then _contact_update, _contact_position, _contact_prepare, _contact_velocity and
#                                     _body_move, for this body alone
#         _lander_view                the observation
#         _lander_shaping             the potential of the reward; _lander_sparse_reward, if asked for, at the end
#         _lander_draw                after the end of an episode: what is random at the start of the next
#
# A reset is _lander_draw for all environments, then _lander_step with `begin`: Gymnasium's reset makes a step, too.
#
# In names: b is a body, k a leg and its joint, w an angular velocity, (nx, ny) a normal, (rx, ry) an arm from a centre
# of mass. Of a joint, "a" is the lander and "b" the leg; of a contact, "b" is the body. `slot` is 0 for its contact
# with an even edge, 1 for that with an odd one. A "turn" is an angular impulse, or the angle that it turns by.

# Without reference counts on arrays, which cost more than the physics here; such a function cannot allocate.
uncounted = partial(kernel, _nrt=False)

# ---- Constants: Gymnasium's task ----

f32 = np.float32
# A Python float is a float64 to numba, and makes one of whatever meets it; these leave float32 as it is.
F32_ZERO = f32(0.0)
F32_HALF = f32(0.5)
F32_ONE = f32(1.0)
F32_TWO = f32(2.0)
F32_INF = f32(np.inf)

LANDER_FPS = 50  # steps per second
LANDER_PIXELS = 30.0  # per metre, Gymnasium's SCALE
MOON_WIDTH = 600 / LANDER_PIXELS  # what is seen of it [m]
MOON_HEIGHT = 400 / LANDER_PIXELS
MOON_CHUNKS = 10  # edges of the terrain, all equally wide; Gymnasium's CHUNKS, 11, counts the points between them
MOON_CHUNK_WIDTH = f32(MOON_WIDTH / MOON_CHUNKS)
MOON_PAD_HEIGHT = MOON_HEIGHT / 4
LANDER_LARGEST_PUSH = 1000.0  # on the lander during the first step, along each axis [N]
MAIN_ENGINE_POWER = 13.0  # impulse per metre that the thruster is off the centre [kg / s]
SIDE_ENGINE_POWER = 0.6
MAIN_ENGINE_DOWN = 4 / LANDER_PIXELS  # [m]
SIDE_ENGINE_UP = 14 / LANDER_PIXELS
SIDE_ENGINE_AWAY = 12 / LANDER_PIXELS
LEG_AWAY = 20 / LANDER_PIXELS  # from a leg's middle to its joint, which is the lander's origin [m]
LEG_DOWN = 18 / LANDER_PIXELS
LEG_TILT = 0.05  # of a leg when its joint reads zero [rad]

# Throttles of the discrete actions: nothing, left engine, main engine, right engine.
THROTTLES = np.array([(0, 0), (0, -1), (1, 0), (0, 1)], np.float32)

# ---- Constants: Box2D's settings (b2Settings.h) ----

BOX2D_TIME_STEP = f32(1 / LANDER_FPS)
BOX2D_VELOCITY_ITERATIONS = 180
BOX2D_POSITION_ITERATIONS = 60
BOX2D_PI = f32(3.14159265359)
BOX2D_LINEAR_SLOP = f32(0.005)  # what the position iterations leave as it is [m]
BOX2D_ANGULAR_SLOP = F32_TWO / f32(180.0) * BOX2D_PI  # [rad]
BOX2D_SKIN = F32_TWO * BOX2D_LINEAR_SLOP  # shapes are thicker than their outlines by this much [m]
BOX2D_BAUMGARTE = f32(0.2)  # share of an overlap that one position iteration takes away
BOX2D_MAX_CORRECTION = f32(0.2)  # in one position iteration [m]
BOX2D_MAX_ANGULAR_CORRECTION = f32(8.0) / f32(180.0) * BOX2D_PI  # [rad]
BOX2D_MAX_TRANSLATION = f32(2.0)  # in one step [m]
BOX2D_MAX_ROTATION = F32_HALF * BOX2D_PI  # [rad]
BOX2D_SLEEP_SPEED = f32(0.01)  # a body below both is at rest [m / s]
BOX2D_SLEEP_SPIN = BOX2D_ANGULAR_SLOP  # [rad / s]
BOX2D_SLEEP_TIME = f32(0.5)  # all bodies fall asleep when each has been at rest for so long [s]
BOX2D_MAX_CONDITION = f32(1000.0)  # of the matrix of a contact of two points; above it one point is solved

# Of the time of impact, "TOI".
TOI_POSITION_ITERATIONS = 20
TOI_BAUMGARTE = f32(0.75)
TOI_TARGET = BOX2D_LINEAR_SLOP  # distance at which two outlines have hit [m]
TOI_TOLERANCE = f32(0.25) * BOX2D_LINEAR_SLOP
TOI_ITERATIONS = 20
TOI_PUSHES = 16
TOI_ROOT_ITERATIONS = 50
TOI_HITS = 8  # of a body on one edge in one step
TOI_END = F32_ONE - f32(10.0) * np.finfo(f32).eps  # a hit later than this is left to the next step [steps]

# ---- Constants: bodies and joints ----

# The bodies: the lander, and its legs, first the right one. Outlines run anticlockwise; columns are x and y.
LANDER_BODIES = 3
LANDER_LEGS = 2
BODY_LANDER, BODY_RIGHT_LEG, BODY_LEFT_LEG = range(3)
LEG_RIGHT, LEG_LEFT = range(2)  # and their joints
BODY_HULL_OUTLINE = np.array([(17, -10), (17, 0), (14, 17), (-14, 17), (-17, 0), (-17, -10)]) / LANDER_PIXELS
BODY_LEG_OUTLINE = np.pad(np.array([(-2, -8), (2, -8), (2, 8), (-2, 8)]) / LANDER_PIXELS, ((0, 2), (0, 0)))
BODY_N_CORNERS = np.array([6, 4, 4])
BODY_CORNERS = np.array([BODY_HULL_OUTLINE, BODY_LEG_OUTLINE, BODY_LEG_OUTLINE], f32)  # (3, 6, 2) [m]


def _outward_normals(corners):
    """Unit normals (6, 2) of the faces of an outline (n, 2), padded with zeros."""
    along = np.roll(corners, -1, axis=0) - corners
    normals = along[:, ::-1] * f32([1, -1]) * (F32_ONE / np.sqrt((along**2).sum(axis=1, keepdims=True)))
    return np.pad(normals, ((0, 6 - len(corners)), (0, 0)))


# (3, 6, 2), of face i, which goes from corner i to the next
BODY_FACES = np.stack([_outward_normals(corners[:n]) for corners, n in zip(BODY_CORNERS, BODY_N_CORNERS, strict=True)])
BODY_MASS = np.array([4.8166666, 0.07111112, 0.07111112], f32)  # as Box2D has it from these outlines [kg]
BODY_INERTIA = np.array([0.7838807, 0.0017909470, 0.0017909470], f32)  # about the centre of mass [kg m^2]
BODY_CENTER = np.array([0.10130719, 0.0, 0.0], f32)  # height of the centre of mass above the body's origin [m]
BODY_INV_MASS = F32_ONE / BODY_MASS
BODY_INV_INERTIA = F32_ONE / BODY_INERTIA
BODY_FRICTION = np.sqrt(np.array([0.1, 0.2, 0.2], f32) * f32(0.1))
BODY_REACH = np.array([0.75, 0.3, 0.3], f32)  # from a centre of mass to the farthest corner, and then some [m]
BODY_SOLVE_ORDER = np.array([2, 0, 1])  # in which Box2D comes upon the contacts of the bodies
LANDER_REACH = f32(0.8)  # from the lander's origin to any point of the legs, and then some [chunks]

# Joints: motors press the legs outwards, against these limits.
LEG_SIGN = np.array([-1, 1], f32)  # Gymnasium's i
LEG_MOTOR_SPEED = LEG_SIGN * f32(0.3)  # [rad / s]
LEG_MAX_MOTOR_IMPULSE = BOX2D_TIME_STEP * f32(40.0)  # [N m s]
LEG_LOWER_ANGLE = np.array([0.9 - 0.5, -0.9], f32)  # [rad]
LEG_UPPER_ANGLE = np.array([0.9, -0.9 + 0.5], f32)
LEG_REFERENCE = LEG_SIGN * f32(LEG_TILT)  # a leg's angle to the lander when its joint reads zero [rad]
LEG_ANCHOR = np.array([[-LEG_AWAY, LEG_DOWN], [LEG_AWAY, LEG_DOWN]], f32)  # (2, 2), of the joint, from the leg's middle

# ---- Constants: names of columns ----

POSE_X, POSE_Y, POSE_ANGLE, POSE_COS, POSE_SIN = range(5)  # of poses and velocities; the last two only of `start`
ROTATION_COS, ROTATION_SIN = range(2)  # of a body's angle, now
IMPULSE_X, IMPULSE_Y, IMPULSE_LIMIT, IMPULSE_MOTOR = range(4)  # of a joint
IMPULSE_NORMAL, IMPULSE_TANGENT = range(2)  # of a contact
WIND_FORCE, WIND_TORQUE = range(2)  # of the counters `wind`
THROTTLE_MAIN, THROTTLE_SIDE = range(2)

# Of `contact`: normal and a corner of the face that carries it, in the frame of body or ground, whichever owns it;
# then the points that lie on it, in the frame of the other, the second one two columns on.
MANIFOLD_NX, MANIFOLD_NY, MANIFOLD_X, MANIFOLD_Y, MANIFOLD_POINT_X, MANIFOLD_POINT_Y = range(6)
# Of `contact_kind`: whose face it is, points found and solved, place among the contacts of the lane, hits in this step.
MANIFOLD_KIND, MANIFOLD_POINTS, MANIFOLD_SOLVED, MANIFOLD_PLACE, MANIFOLD_HITS = range(5)
MANIFOLD_ON_EDGE, MANIFOLD_ON_BODY = range(2)  # kinds
CONTACT_NO_IMPULSE = np.zeros((3, 2, 2, 2), f32)
# b2ContactFeature in one number: index A, + 8 index B, + 64 if A is a face, + 128 if B is; else they are corners.
FEATURE_INDEX_B = 8
FEATURE_FACE_A = 64
FEATURE_FACE_B = 128
SOLVING_LANES, SOLVING_TWO_POINTS = range(2)  # of `solving`: lanes with this contact, lanes where it has two points

# Of `sight`, the observation; then of the statistics.
SIGHT_X, SIGHT_Y, SIGHT_VX, SIGHT_VY, SIGHT_ANGLE, SIGHT_SPIN, SIGHT_RIGHT_LEG, SIGHT_LEFT_LEG = range(8)
SIGHT_COLUMNS = 8
(
    LANDER_STAT_RETURN, LANDER_STAT_LENGTH, LANDER_STAT_SUCCESS, LANDER_STAT_LANDED, LANDER_STAT_CRASHED,
    LANDER_STAT_SPEED, LANDER_STAT_X,
) = range(7)  # as in `LunarLander.stat_names`; the first two are those of `totals`, too  # fmt: skip

# ---- Constants: rows of lanes ----
# The velocity iterations work on the flat array `rows`. A row has a number for every lane, and what is named here is
# where a row begins: that of lane 3 lies 3 further on. A stride is the way from one body, joint, contact or point to
# the next.

LANDER_LANES = 32  # two of the widest vectors, so that one's arithmetic hides the other's latency

ROW_VELOCITY = 0  # per body:
ROW_X, ROW_Y, ROW_ANGLE, VELOCITY_STRIDE = range(0, 4 * LANDER_LANES, LANDER_LANES)
ROW_IMPULSE = ROW_VELOCITY + LANDER_BODIES * VELOCITY_STRIDE  # per joint, after x and y of the same names:
ROW_LIMIT, ROW_MOTOR, IMPULSE_STRIDE = range(2 * LANDER_LANES, 5 * LANDER_LANES, LANDER_LANES)

ROW_JOINT = ROW_IMPULSE + LANDER_LEGS * IMPULSE_STRIDE  # per joint:
(
    JOINT_AX, JOINT_AY, JOINT_BX, JOINT_BY,  # arms: where the joint is, from the centres of mass of lander and leg
    JOINT_K11, JOINT_K12, JOINT_K13,  # what an impulse at the joint (x, y, turn) does to the velocity there:
    JOINT_K22, JOINT_K23, JOINT_K33,  # a symmetric matrix
    JOINT_INV_DET2, JOINT_INV_DET3,  # one over the determinants of its x, y part and of all of it
    JOINT_C1, JOINT_C2, JOINT_C3,  # cross product of its second and third column
    JOINT_MOTOR_MASS,
    JOINT_LIMIT,  # -1 at the lower limit, 1 at the upper, 0 between
    JOINT_STRIDE,
) = range(0, 18 * LANDER_LANES, LANDER_LANES)  # fmt: skip

ROW_CONTACT = ROW_JOINT + LANDER_LEGS * JOINT_STRIDE  # per body and slot:
(
    CONTACT_NORMAL_X, CONTACT_NORMAL_Y,  # from the ground to the body
    CONTACT_N11, CONTACT_N12, CONTACT_N22,  # what impulses at two points do to the velocities there, along the normal
    CONTACT_M11, CONTACT_M12, CONTACT_M22,  # the inverse of this matrix
    CONTACT_TWO_POINTS,  # 1 where two points are solved together
    CONTACT_ARM_X, CONTACT_ARM_Y,  # of point 1, from the centre of mass; all from here on again for point 2
    CONTACT_NORMAL_MASS, CONTACT_TANGENT_MASS,
    CONTACT_NORMAL_IMPULSE, CONTACT_TANGENT_IMPULSE,
    CONTACT_POINT_END,
) = range(0, 16 * LANDER_LANES, LANDER_LANES)  # fmt: skip
CONTACT_POINT_STRIDE = CONTACT_POINT_END - CONTACT_ARM_X
CONTACT_STRIDE = CONTACT_POINT_END + CONTACT_POINT_STRIDE

ROW_END = ROW_CONTACT + 2 * LANDER_BODIES * CONTACT_STRIDE

# ---- State and scratch ----


class LanderParams(NamedTuple):
    gravity: float  # [m / s^2]
    wind_power: float  # largest force [N], with enable_wind
    turbulence_power: float  # largest torque [N m]
    enable_wind: bool
    randomize_spawn: bool
    sparse_reward: bool
    max_steps: int


# Records, which a kernel takes as one array: to pass each field as its own took a tenth of the time of a step.
LANDER_STATE = np.dtype(
    [
        ("terrain", f32, MOON_CHUNKS + 1),  # heights [m]
        ("pose", f32, (3, 3)),  # x, y of each body's centre of mass [m] and its angle [rad]
        ("velocity", f32, (3, 3)),  # of the same
        ("joint_impulse", f32, (2, 4)),  # x, y, limit and motor, of the last step
        ("joint_limit", np.int64, 2),  # -1 at its lower limit, 1 at its upper, 0 between
        ("touched", np.int64, (3, 2)),  # the edges that each body touches, even and odd ones; -1 where none
        ("feature", np.int64, (3, 2, 2)),  # which corners and faces each contact point is made of; -1 where none
        ("contact_impulse", f32, (3, 2, 2, 2)),  # along the normal and the tangent, of the last step
        ("grounded", np.int8, 3),  # whether the hull, which is a crash, and each leg stand on the ground
        ("still", f32, 3),  # how long each body has been at rest [s]
        ("push", np.float64, 2),  # force on the lander during the coming step [N]
        ("wind", np.int64, 2),  # counters of the wind and of the turbulence
        ("throttle", np.float64, 2),  # of the last step, for the picture
        ("shaping", np.float64),  # potential of the reward
        ("elapsed", np.int64),  # steps since the reset
        ("totals", np.float64, 2),  # return and length of the episode so far
        ("rng", np.int64, 2),
    ],
    align=True,
)
LanderState = namedtuple("LanderState", LANDER_STATE.names)  # (num_envs, ...) each, views of the records

# Room for one step of as many environments as there are lanes, used again for the next.
LANDER_SCRATCH = np.dtype(
    [
        ("lane_env", np.int64, LANDER_LANES),  # which environment is in it
        ("fresh", np.int8, LANDER_LANES),  # whether it takes the first step, that belongs to the reset
        ("near", np.int8, LANDER_LANES),  # whether it may touch the ground in this step
        ("solving", np.int64, (6, 2)),  # lanes with a first and a second contact of each body; those with two points
        ("rows", f32, ROW_END),  # what the velocity iterations work on
        ("start", f32, (LANDER_LANES, 3, 5)),  # poses before the step, and cos and sin of their angles
        ("contact", f32, (LANDER_LANES, 6, 8)),  # manifolds, in row 2 * body + slot
        ("contact_kind", np.int64, (LANDER_LANES, 6, 5)),  # what is counted of them
        ("rotation", f32, (3, 2)),  # cos and sin of the angles
        ("corners", f32, (6, 2)),  # of one body [m]
        ("faces", f32, (6, 2)),  # their normals
        ("impact_rows", f32, ROW_END),  # for one body that hit the ground
        ("heights", np.float64, MOON_CHUNKS + 2),  # the terrain before smoothing [m]
        ("sight", np.float64, SIGHT_COLUMNS),  # the observation in float64
    ],
    align=True,
)


@uncounted
def _clamp(x, low, high):
    return min(max(x, low), high)


# ---- Start of an episode ----


@uncounted
def _lander_terrain(heights, terrain):
    """Gymnasium's terrain (MOON_CHUNKS + 1,) from raw heights (MOON_CHUNKS + 2,), both in metres.

    The pad is levelled first, then every height becomes 0.33 times the sum of three: Gymnasium's mean.
    """
    middle = MOON_CHUNKS // 2
    heights[middle - 2 : middle + 3] = MOON_PAD_HEIGHT
    for i in range(MOON_CHUNKS + 1):
        terrain[i] = 0.33 * (heights[i - 1 if i > 0 else MOON_CHUNKS + 1] + heights[i] + heights[i + 1])


@uncounted
def _lander_draw(env, params, state, scratch):
    """What is random at the start of an episode, in Gymnasium's order.

    The lander's row of `pose` gets the pose of its origin; `_lander_begin` makes that of its centre of mass of it.
    """
    rng = state.rng
    lander = state[env]
    pose = lander.pose
    for i in range(MOON_CHUNKS + 2):
        scratch.heights[i] = _uniform(rng, env, 0.0, MOON_HEIGHT / 2)
    _lander_terrain(scratch.heights, lander.terrain)
    x, y = MOON_WIDTH / 2, MOON_HEIGHT
    angle = 0.0
    if params.randomize_spawn:
        x = _uniform(rng, env, 0.1 * MOON_WIDTH, 0.9 * MOON_WIDTH)
        y = _uniform(rng, env, 0.7 * MOON_HEIGHT, MOON_HEIGHT)
        angle = _uniform(rng, env, -0.25, 0.25)
    pose[BODY_LANDER, POSE_X], pose[BODY_LANDER, POSE_Y] = x, y
    pose[BODY_LANDER, POSE_ANGLE] = angle
    for i in range(2):
        lander.push[i] = _uniform(rng, env, -LANDER_LARGEST_PUSH, LANDER_LARGEST_PUSH)
    if params.enable_wind:
        for i in range(2):
            lander.wind[i] = math.floor(_uniform(rng, env, -9999.0, 9999.0))


@uncounted
def _lander_draw_all(params, state, scratch):
    """`_lander_draw` for every environment."""
    for env in range(len(state)):
        _lander_draw(env, params, state, scratch[0])


@uncounted
def _lander_begin(lander):
    """Put the bodies at rest in their places, legs beside the lander: in the first step the joints pull them in.

    The lander's row of `pose` holds the pose of its origin, as `_lander_draw` left it, in float64 as in Gymnasium.
    """
    pose = lander.pose
    x, y = np.float64(pose[BODY_LANDER, POSE_X]), np.float64(pose[BODY_LANDER, POSE_Y])
    angle = np.float64(pose[BODY_LANDER, POSE_ANGLE])
    cos, sin = math.cos(angle), math.sin(angle)
    pose[BODY_LANDER, POSE_X] = x - sin * np.float64(BODY_CENTER[BODY_LANDER])
    pose[BODY_LANDER, POSE_Y] = y + cos * np.float64(BODY_CENTER[BODY_LANDER])
    for k in range(LANDER_LEGS):
        b = BODY_RIGHT_LEG + k
        side = np.float64(LEG_SIGN[k])
        pose[b, POSE_X] = x - cos * side * LEG_AWAY
        pose[b, POSE_Y] = y - sin * side * LEG_AWAY
        pose[b, POSE_ANGLE] = angle + side * LEG_TILT
    lander.velocity[:] = F32_ZERO
    lander.joint_impulse[:] = F32_ZERO
    lander.joint_limit[:] = 0
    lander.touched[:] = -1
    lander.feature[:] = -1
    lander.contact_impulse[:] = F32_ZERO
    lander.grounded[:] = False
    lander.still[:] = F32_ZERO
    lander.shaping = 0.0
    lander.elapsed = 0
    lander.totals[:] = 0.0


# ---- Engines and wind ----


@uncounted
def _lander_gust(count):
    """Wind or turbulence when its counter is at `count`, as a share of the largest, in [-1, 1]; never periodic."""
    return math.tanh(math.sin(0.02 * count) + math.sin(math.pi * 0.01 * count))


@uncounted
def _lander_thrust(impulse_x, impulse_y, x, y, pose, velocity):
    """b2Body::ApplyLinearImpulse: an impulse [N s] on the lander at (x, y) in the world [m]."""
    impulse_x, impulse_y = f32(impulse_x), f32(impulse_y)
    velocity[BODY_LANDER, POSE_X] += BODY_INV_MASS[BODY_LANDER] * impulse_x
    velocity[BODY_LANDER, POSE_Y] += BODY_INV_MASS[BODY_LANDER] * impulse_y
    arm_x, arm_y = f32(x) - pose[BODY_LANDER, POSE_X], f32(y) - pose[BODY_LANDER, POSE_Y]
    velocity[BODY_LANDER, POSE_ANGLE] += BODY_INV_INERTIA[BODY_LANDER] * (arm_x * impulse_y - arm_y * impulse_x)


@uncounted
def _lander_engines(env, main, lateral, force_x, params, state, scratch):
    """Gymnasium's `step` before it steps Box2D: wind, and the engines' impulses on the lander.

    `main` and `lateral` are the actions, in [-1, 1] after clipping. Returns `force_x` [N] with the wind's force, and
    the turbulence's torque [N m]. Leaves cos and sin of the bodies' angles in `scratch.rotation`.
    """
    rng = state.rng
    lander = state[env]
    rotation = scratch.rotation
    pose = lander.pose
    velocity = lander.velocity

    # Wind, until a leg touches the ground.
    torque = 0.0
    if params.enable_wind and not (lander.grounded[BODY_RIGHT_LEG] or lander.grounded[BODY_LEFT_LEG]):
        force_x = f32(force_x) + f32(params.wind_power * _lander_gust(lander.wind[WIND_FORCE]))
        torque = params.turbulence_power * _lander_gust(lander.wind[WIND_TORQUE])
        lander.wind[WIND_FORCE] += 1
        lander.wind[WIND_TORQUE] += 1

    # Throttles and dispersion, which is drawn even where no engine fires.
    dispersion0 = _uniform(rng, env, -1.0, 1.0) / LANDER_PIXELS
    dispersion1 = _uniform(rng, env, -1.0, 1.0) / LANDER_PIXELS
    main = min(max(main, -1.0), 1.0)
    lateral = min(max(lateral, -1.0), 1.0)
    main_power = 0.5 * (main + 1.0) if main > 0.0 else 0.0
    side_power = abs(lateral) if abs(lateral) > 0.5 else 0.0
    lander.throttle[THROTTLE_MAIN] = main_power
    lander.throttle[THROTTLE_SIDE] = math.copysign(side_power, lateral)

    # The lander's origin (x, y), and the direction of its tip, in float64 as in Gymnasium.
    for b in range(LANDER_BODIES):
        _body_rotate(b, pose, rotation)
    if main_power > 0.0 or side_power > 0.0:
        angle = pose[BODY_LANDER, POSE_ANGLE]
        tip_x, tip_y = math.sin(np.float64(angle)), math.cos(np.float64(angle))
        x = np.float64(pose[BODY_LANDER, POSE_X] + rotation[BODY_LANDER, ROTATION_SIN] * BODY_CENTER[BODY_LANDER])
        y = np.float64(pose[BODY_LANDER, POSE_Y] - rotation[BODY_LANDER, ROTATION_COS] * BODY_CENTER[BODY_LANDER])

    # The main engine fires downwards, the side engines sideways; (ox, oy) is from the origin to the nozzle.
    if main_power > 0.0:
        along = MAIN_ENGINE_DOWN + 2 * dispersion0
        ox, oy = tip_x * along - tip_y * dispersion1, -tip_y * along - tip_x * dispersion1
        power = MAIN_ENGINE_POWER
        _lander_thrust(-ox * power * main_power, -oy * power * main_power, x + ox, y + oy, pose, velocity)
    if side_power > 0.0:
        along = 3 * dispersion1 + math.copysign(SIDE_ENGINE_AWAY, lateral)
        ox, oy = tip_x * dispersion0 - tip_y * along, -tip_y * dispersion0 - tip_x * along
        # 17 and SIDE_ENGINE_UP are not the same height: the torque depends on the angle, as it does in Gymnasium.
        px = x + ox - tip_x * 17 / LANDER_PIXELS
        py = y + oy + tip_y * SIDE_ENGINE_UP
        power = SIDE_ENGINE_POWER
        _lander_thrust(-ox * power * side_power, -oy * power * side_power, px, py, pose, velocity)
    return force_x, torque


# ---- Bodies ----


@uncounted
def _body_rotate(b, pose, rotation):
    """cos and sin of a body's angle."""
    rotation[b, ROTATION_COS] = math.cos(pose[b, POSE_ANGLE])
    rotation[b, ROTATION_SIN] = math.sin(pose[b, POSE_ANGLE])


@uncounted
def _body_move(b, pose, velocity, h):
    """b2Island::Solve: move a body for `h` seconds, at most so far and by such an angle as Box2D allows in a step."""
    x, y = h * velocity[b, POSE_X], h * velocity[b, POSE_Y]
    turn = h * velocity[b, POSE_ANGLE]
    square = x * x + y * y
    if square > BOX2D_MAX_TRANSLATION * BOX2D_MAX_TRANSLATION:
        ratio = BOX2D_MAX_TRANSLATION / math.sqrt(square)
        velocity[b, POSE_X] *= ratio
        velocity[b, POSE_Y] *= ratio
    if turn * turn > BOX2D_MAX_ROTATION * BOX2D_MAX_ROTATION:
        velocity[b, POSE_ANGLE] *= BOX2D_MAX_ROTATION / abs(turn)
    pose[b, POSE_X] += h * velocity[b, POSE_X]
    pose[b, POSE_Y] += h * velocity[b, POSE_Y]
    pose[b, POSE_ANGLE] += h * velocity[b, POSE_ANGLE]


@uncounted
def _body_outline(b, cos, sin, x, y, corners, faces):
    """Corners [m] and face normals in the world, (6, 2) each, of a body whose centre of mass is at (x, y)."""
    x, y = x + sin * BODY_CENTER[b], y - cos * BODY_CENTER[b]
    for i in range(BODY_N_CORNERS[b]):
        corners[i, 0] = cos * BODY_CORNERS[b, i, 0] - sin * BODY_CORNERS[b, i, 1] + x
        corners[i, 1] = sin * BODY_CORNERS[b, i, 0] + cos * BODY_CORNERS[b, i, 1] + y
        faces[i, 0] = cos * BODY_FACES[b, i, 0] - sin * BODY_FACES[b, i, 1]
        faces[i, 1] = sin * BODY_FACES[b, i, 0] + cos * BODY_FACES[b, i, 1]


@uncounted
def _body_edges(b, start, pose, terrain):
    """First and last edge that a body may touch anywhere between two poses; if none, the last is before the first."""
    low = min(start[b, POSE_X], pose[b, POSE_X]) - BODY_REACH[b]
    high = max(start[b, POSE_X], pose[b, POSE_X]) + BODY_REACH[b]
    first = max(int(low / MOON_CHUNK_WIDTH), 0)
    last = min(int(high / MOON_CHUNK_WIDTH), MOON_CHUNKS - 1)
    ground = F32_ZERO
    for i in range(first, last + 2):
        ground = max(ground, terrain[i])
    return (first, last) if min(start[b, POSE_Y], pose[b, POSE_Y]) - BODY_REACH[b] <= ground else (0, -1)


# ---- Joints ----


@uncounted
def _joint_prepare(k, lane, pose, velocity, rotation, impulse, limit, rows):
    """b2RevoluteJoint::InitVelocityConstraints: effective masses, limit, warm start."""
    b = BODY_RIGHT_LEG + k

    # The hinge's velocity per impulse there, K, from the arms.
    cos_a, sin_a = rotation[BODY_LANDER, ROTATION_COS], rotation[BODY_LANDER, ROTATION_SIN]
    cos_b, sin_b = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
    ax, ay = sin_a * BODY_CENTER[BODY_LANDER], -(cos_a * BODY_CENTER[BODY_LANDER])
    bx = cos_b * LEG_ANCHOR[k, 0] - sin_b * LEG_ANCHOR[k, 1]
    by = sin_b * LEG_ANCHOR[k, 0] + cos_b * LEG_ANCHOR[k, 1]
    m_a = BODY_INV_MASS[BODY_LANDER]
    m_b = BODY_INV_MASS[b]
    i_a = BODY_INV_INERTIA[BODY_LANDER]
    i_b = BODY_INV_INERTIA[b]
    k11 = m_a + m_b + ay * ay * i_a + by * by * i_b
    k12 = -ay * ax * i_a - by * bx * i_b
    k13 = -ay * i_a - by * i_b
    k22 = m_a + m_b + ax * ax * i_a + bx * bx * i_b
    k23 = ax * i_a + bx * i_b
    k33 = i_a + i_b
    c1 = k22 * k33 - k23 * k23
    c2 = k23 * k13 - k12 * k33
    c3 = k12 * k23 - k22 * k13

    # At which limit the leg is; a limit that it has left, or come to, has no impulse yet.
    angle = pose[b, POSE_ANGLE] - pose[BODY_LANDER, POSE_ANGLE] - LEG_REFERENCE[k]
    state = -1 if angle <= LEG_LOWER_ANGLE[k] else 1 if angle >= LEG_UPPER_ANGLE[k] else 0
    if state == 0 or state != limit[k]:
        impulse[k, IMPULSE_LIMIT] = F32_ZERO
    limit[k] = state

    # Warm start: the impulses of the last step once more.
    x, y = impulse[k, IMPULSE_X], impulse[k, IMPULSE_Y]
    turn = impulse[k, IMPULSE_MOTOR]
    velocity[BODY_LANDER, POSE_X] -= m_a * x
    velocity[BODY_LANDER, POSE_Y] -= m_a * y
    velocity[BODY_LANDER, POSE_ANGLE] -= i_a * (ax * y - ay * x + turn + impulse[k, IMPULSE_LIMIT])
    velocity[b, POSE_X] += m_b * x
    velocity[b, POSE_Y] += m_b * y
    velocity[b, POSE_ANGLE] += i_b * (bx * y - by * x + turn + impulse[k, IMPULSE_LIMIT])

    # Into the lane.
    at = ROW_JOINT + k * JOINT_STRIDE + lane
    rows[at + JOINT_AX], rows[at + JOINT_AY] = ax, ay
    rows[at + JOINT_BX], rows[at + JOINT_BY] = bx, by
    rows[at + JOINT_K11] = k11
    rows[at + JOINT_K12] = k12
    rows[at + JOINT_K13] = k13
    rows[at + JOINT_K22] = k22
    rows[at + JOINT_K23] = k23
    rows[at + JOINT_K33] = k33
    rows[at + JOINT_C1] = c1
    rows[at + JOINT_C2] = c2
    rows[at + JOINT_C3] = c3
    rows[at + JOINT_INV_DET2] = F32_ONE / (k11 * k22 - k12 * k12)
    rows[at + JOINT_INV_DET3] = F32_ONE / (k11 * c1 + k12 * c2 + k13 * c3)
    rows[at + JOINT_MOTOR_MASS] = F32_ONE / k33
    rows[at + JOINT_LIMIT] = f32(state)


@inlined
def _joint_velocity(k, rows):
    """b2RevoluteJoint::SolveVelocityConstraints in all lanes: the motor, then limit and hinge together.

    Like all that is done to lanes, without branches and without calls that take an array: then it becomes vector code.
    """
    b = BODY_RIGHT_LEG + k
    m_a = BODY_INV_MASS[BODY_LANDER]
    m_b = BODY_INV_MASS[b]
    i_a = BODY_INV_INERTIA[BODY_LANDER]
    i_b = BODY_INV_INERTIA[b]
    for lane in range(LANDER_LANES):
        at_a = ROW_VELOCITY + lane
        at_b = ROW_VELOCITY + b * VELOCITY_STRIDE + lane
        at_i = ROW_IMPULSE + k * IMPULSE_STRIDE + lane
        at = ROW_JOINT + k * JOINT_STRIDE + lane
        ax, ay = rows[at + JOINT_AX], rows[at + JOINT_AY]
        bx, by = rows[at + JOINT_BX], rows[at + JOINT_BY]
        k11 = rows[at + JOINT_K11]
        k12 = rows[at + JOINT_K12]
        k13 = rows[at + JOINT_K13]
        k22 = rows[at + JOINT_K22]
        k23 = rows[at + JOINT_K23]
        k33 = rows[at + JOINT_K33]
        inv2 = rows[at + JOINT_INV_DET2]
        inv3 = rows[at + JOINT_INV_DET3]
        state = rows[at + JOINT_LIMIT]
        vx_a, vy_a = rows[at_a + ROW_X], rows[at_a + ROW_Y]
        w_a = rows[at_a + ROW_ANGLE]
        vx_b, vy_b = rows[at_b + ROW_X], rows[at_b + ROW_Y]
        w_b = rows[at_b + ROW_ANGLE]

        # The motor turns the leg at its speed, as far as its torque allows.
        old = rows[at_i + ROW_MOTOR]
        new = _clamp(
            old - rows[at + JOINT_MOTOR_MASS] * (w_b - w_a - LEG_MOTOR_SPEED[k]),
            -LEG_MAX_MOTOR_IMPULSE,
            LEG_MAX_MOTOR_IMPULSE,
        )
        rows[at_i + ROW_MOTOR] = new
        w_a -= i_a * (new - old)
        w_b += i_b * (new - old)

        # Limit and hinge: the impulses (x3, y3, turn) that stop the hinge from coming apart, (dx, dy), and the leg from
        # turning; and (x2, y2) for the hinge alone, with the limit's impulse taken back.
        dx = vx_b - w_b * by - vx_a + w_a * ay
        dy = vy_b + w_b * bx - vy_a - w_a * ax
        spin = w_b - w_a
        x3 = -(inv3 * (dx * rows[at + JOINT_C1] + dy * rows[at + JOINT_C2] + spin * rows[at + JOINT_C3]))
        y3 = -(inv3 * (k11 * (dy * k33 - spin * k23) + k12 * (spin * k13 - dx * k33) + k13 * (dx * k23 - dy * k13)))
        turn = -(inv3 * (k11 * (k22 * spin - k23 * dy) + k12 * (k23 * dx - k12 * spin) + k13 * (k12 * dy - k22 * dx)))
        limit = rows[at_i + ROW_LIMIT]
        held = (state != F32_ZERO) & (state * (limit + turn) <= F32_ZERO)  # a limit pushes, and never pulls
        dx, dy = dx - limit * k13, dy - limit * k23
        x2, y2 = inv2 * (k22 * -dx - k12 * -dy), inv2 * (k11 * -dy - k12 * -dx)
        x = x3 if held else x2
        y = y3 if held else y2
        turn = turn if held else -limit

        # Back into the lane.
        rows[at_i + ROW_X] += x
        rows[at_i + ROW_Y] += y
        rows[at_i + ROW_LIMIT] = limit + turn
        rows[at_a + ROW_X] = vx_a - m_a * x
        rows[at_a + ROW_Y] = vy_a - m_a * y
        rows[at_a + ROW_ANGLE] = w_a - i_a * (ax * y - ay * x + turn)
        rows[at_b + ROW_X] = vx_b + m_b * x
        rows[at_b + ROW_Y] = vy_b + m_b * y
        rows[at_b + ROW_ANGLE] = w_b + i_b * (bx * y - by * x + turn)


@uncounted
def _joint_position(k, pose, limit):
    """b2RevoluteJoint::SolvePositionConstraints: pull limit and hinge together; True if they were near enough."""
    b = BODY_RIGHT_LEG + k
    m_a = BODY_INV_MASS[BODY_LANDER]
    m_b = BODY_INV_MASS[b]
    i_a = BODY_INV_INERTIA[BODY_LANDER]
    i_b = BODY_INV_INERTIA[b]
    angle_a = pose[BODY_LANDER, POSE_ANGLE]
    angle_b = pose[b, POSE_ANGLE]

    # The limit: turn both bodies until the leg is back, or by the largest correction.
    angular_error = F32_ZERO
    if limit[k] != 0:
        angle = angle_b - angle_a - LEG_REFERENCE[k]
        if limit[k] < 0:
            c = angle - LEG_LOWER_ANGLE[k]
            angular_error = -c
            c = _clamp(c + BOX2D_ANGULAR_SLOP, -BOX2D_MAX_ANGULAR_CORRECTION, F32_ZERO)
        else:
            c = angle - LEG_UPPER_ANGLE[k]
            angular_error = c
            c = _clamp(c - BOX2D_ANGULAR_SLOP, F32_ZERO, BOX2D_MAX_ANGULAR_CORRECTION)
        turn = -(F32_ONE / (i_a + i_b)) * c
        angle_a -= i_a * turn
        angle_b += i_b * turn

    # The hinge: bring the two ends (dx, dy) together.
    cos_a, sin_a = math.cos(angle_a), math.sin(angle_a)
    cos_b, sin_b = math.cos(angle_b), math.sin(angle_b)
    ax, ay = sin_a * BODY_CENTER[BODY_LANDER], -(cos_a * BODY_CENTER[BODY_LANDER])
    bx = cos_b * LEG_ANCHOR[k, 0] - sin_b * LEG_ANCHOR[k, 1]
    by = sin_b * LEG_ANCHOR[k, 0] + cos_b * LEG_ANCHOR[k, 1]
    dx = pose[b, POSE_X] + bx - pose[BODY_LANDER, POSE_X] - ax
    dy = pose[b, POSE_Y] + by - pose[BODY_LANDER, POSE_Y] - ay
    k11 = m_a + m_b + i_a * ay * ay + i_b * by * by
    k12 = -i_a * ax * ay - i_b * bx * by
    k22 = m_a + m_b + i_a * ax * ax + i_b * bx * bx
    inv = F32_ONE / (k11 * k22 - k12 * k12)
    x, y = -(inv * (k22 * dx - k12 * dy)), -(inv * (k11 * dy - k12 * dx))
    pose[BODY_LANDER, POSE_X] -= m_a * x
    pose[BODY_LANDER, POSE_Y] -= m_a * y
    pose[BODY_LANDER, POSE_ANGLE] = angle_a - i_a * (ax * y - ay * x)
    pose[b, POSE_X] += m_b * x
    pose[b, POSE_Y] += m_b * y
    pose[b, POSE_ANGLE] = angle_b + i_b * (bx * y - by * x)
    return math.sqrt(dx * dx + dy * dy) <= BOX2D_LINEAR_SLOP and angular_error <= BOX2D_ANGULAR_SLOP


# ---- Contacts: where a body touches the ground ----


@uncounted
def _contact_clip(nx, ny, offset, face, x1, y1, id1, x2, y2, id2):
    """b2ClipSegmentToLine: what of a segment lies behind a line through corner `face`, of normal (nx, ny).

    Returns whether anything is left, then x, y and feature of either end of it.
    """
    d1 = nx * x1 + ny * y1 - offset
    d2 = nx * x2 + ny * y2 - offset
    if d1 > F32_ZERO and d2 > F32_ZERO:
        return False, x1, y1, id1, x2, y2, id2
    if d1 * d2 < F32_ZERO:
        t = d1 / (d1 - d2)
        x, y = x1 + t * (x2 - x1), y1 + t * (y2 - y1)
        new = face + FEATURE_INDEX_B * (id1 // FEATURE_INDEX_B % FEATURE_INDEX_B) + FEATURE_FACE_B
        if d1 > F32_ZERO:  # what is behind the line comes first
            x1, y1 = x2, y2
            id1 = id2
        return True, x1, y1, id1, x, y, new
    return d1 <= F32_ZERO and d2 <= F32_ZERO, x1, y1, id1, x2, y2, id2


@uncounted
def _contact_manifold(b, cos, sin, x, y, x1, y1, x2, y2, corners, faces, contact, kind, feature):
    """b2EPCollider::Collide for a body and the edge from (x1, y1) to (x2, y2), into rows of the contacts.

    (x, y) is the body's centre of mass; `corners` and `faces` are of its outline. Returns the number of points, 0 to 2.
    """
    n = BODY_N_CORNERS[b]
    feature[0] = -1
    feature[1] = -1

    # The edge's normal, on the side where the body is.
    ex, ey = x2 - x1, y2 - y1
    inv = F32_ONE / math.sqrt(ex * ex + ey * ey)
    ex, ey = ex * inv, ey * inv
    nx, ny = ey, -ex
    front = nx * (x - x1) + ny * (y - y1) >= F32_ZERO
    if not front:
        nx, ny = -nx, -ny

    # How far apart they are along the edge's normal, and along that of the face that separates them most.
    edge_gap = F32_INF
    for i in range(n):
        edge_gap = min(edge_gap, nx * (corners[i, 0] - x1) + ny * (corners[i, 1] - y1))
    if edge_gap > F32_TWO * BOX2D_SKIN:
        return 0
    body_gap = -F32_INF
    face = 0
    for i in range(n):
        s1 = -faces[i, 0] * (corners[i, 0] - x1) - faces[i, 1] * (corners[i, 1] - y1)
        s2 = -faces[i, 0] * (corners[i, 0] - x2) - faces[i, 1] * (corners[i, 1] - y2)
        gap = min(s1, s2)
        if gap > F32_TWO * BOX2D_SKIN:
            return 0
        if gap > body_gap:
            body_gap = gap
            face = i

    # The one whose normal separates more carries the contact, the edge when in doubt: its face goes from (fx1, fy1) to
    # (fx2, fy2). What lies against it of the other goes from (px1, py1) to (px2, py2).
    if body_gap > f32(0.98) * edge_gap + f32(0.001):
        kind[MANIFOLD_KIND] = MANIFOLD_ON_BODY
        after = face + 1 if face + 1 < n else 0
        side = face
        other = after
        fx1, fy1 = corners[face, 0], corners[face, 1]
        fx2, fy2 = corners[after, 0], corners[after, 1]
        nx, ny = faces[face, 0], faces[face, 1]
        px1, py1 = x1, y1
        id1 = FEATURE_INDEX_B * face + FEATURE_FACE_B
        px2, py2 = x2, y2
        id2 = FEATURE_INDEX_B * face + FEATURE_FACE_B
    else:
        kind[MANIFOLD_KIND] = MANIFOLD_ON_EDGE
        face = 0
        least = nx * faces[0, 0] + ny * faces[0, 1]
        for i in range(1, n):
            value = nx * faces[i, 0] + ny * faces[i, 1]
            if value < least:
                face = i
                least = value
        after = face + 1 if face + 1 < n else 0
        px1, py1 = corners[face, 0], corners[face, 1]
        id1 = FEATURE_INDEX_B * face + FEATURE_FACE_A
        px2, py2 = corners[after, 0], corners[after, 1]
        id2 = FEATURE_INDEX_B * after + FEATURE_FACE_A
        side = 0 if front else 1
        other = 1 - side
        fx1, fy1 = (x1, y1) if front else (x2, y2)
        fx2, fy2 = (x2, y2) if front else (x1, y1)

    # Cut off what lies beyond either end of the face.
    tx, ty = ny, -nx
    ok, px1, py1, id1, px2, py2, id2 = _contact_clip(tx, ty, tx * fx1 + ty * fy1, side, px1, py1, id1, px2, py2, id2)
    if not ok:
        return 0
    tx, ty = -tx, -ty
    ok, px1, py1, id1, px2, py2, id2 = _contact_clip(tx, ty, tx * fx2 + ty * fy2, other, px1, py1, id1, px2, py2, id2)
    if not ok:
        return 0

    # The face in the frame of what carries it; the points that are near enough to it in that of the other.
    if kind[MANIFOLD_KIND] == MANIFOLD_ON_EDGE:
        contact[MANIFOLD_NX], contact[MANIFOLD_NY] = nx, ny
        contact[MANIFOLD_X], contact[MANIFOLD_Y] = fx1, fy1
    else:
        contact[MANIFOLD_NX], contact[MANIFOLD_NY] = BODY_FACES[b, side, 0], BODY_FACES[b, side, 1]
        contact[MANIFOLD_X], contact[MANIFOLD_Y] = BODY_CORNERS[b, side, 0], BODY_CORNERS[b, side, 1]
    points = 0
    origin_x, origin_y = x + sin * BODY_CENTER[b], y - cos * BODY_CENTER[b]
    for i in range(2):
        px, py = (px1, py1) if i == 0 else (px2, py2)
        which = id1 if i == 0 else id2
        if nx * (px - fx1) + ny * (py - fy1) <= F32_TWO * BOX2D_SKIN:
            if kind[MANIFOLD_KIND] == MANIFOLD_ON_EDGE:
                px, py = px - origin_x, py - origin_y
                px, py = cos * px + sin * py, -sin * px + cos * py
            else:  # the features of body and edge change places
                index_a = which % FEATURE_INDEX_B
                index_b = which // FEATURE_INDEX_B % FEATURE_INDEX_B
                face_a = which // FEATURE_FACE_A % 2
                face_b = which // FEATURE_FACE_B
                which = index_b + FEATURE_INDEX_B * index_a + FEATURE_FACE_A * face_b + FEATURE_FACE_B * face_a
            contact[MANIFOLD_POINT_X + 2 * points], contact[MANIFOLD_POINT_Y + 2 * points] = px, py
            feature[points] = which
            points += 1
    return points


@uncounted
def _contact_update(b, slot, edge, lane, lander, scratch):
    """b2Contact::Update: the manifold, with the impulses of the points that it had before, and what begins or ends.

    `scratch.rotation` and the outline in `scratch` belong to the body's pose.
    """
    pose = lander.pose
    terrain = lander.terrain
    touched = lander.touched
    feature = lander.feature
    impulse = lander.contact_impulse
    grounded = lander.grounded
    rotation = scratch.rotation
    contact = scratch.contact[lane]
    kind = scratch.contact_kind[lane]
    row = 2 * b + slot

    # The points of the last step, if they were on the same edge: they are known by their features.
    old0 = feature[b, slot, 0]
    old1 = feature[b, slot, 1]
    n0 = impulse[b, slot, 0, IMPULSE_NORMAL]
    t0 = impulse[b, slot, 0, IMPULSE_TANGENT]
    n1 = impulse[b, slot, 1, IMPULSE_NORMAL]
    t1 = impulse[b, slot, 1, IMPULSE_TANGENT]
    if touched[b, slot] != edge:
        old0 = -1
        old1 = -1

    # The points of this step, with the impulses of those that were there before.
    x, y = pose[b, POSE_X], pose[b, POSE_Y]
    cos, sin = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
    x1, y1 = f32(edge) * MOON_CHUNK_WIDTH, terrain[edge]
    x2, y2 = f32(edge + 1) * MOON_CHUNK_WIDTH, terrain[edge + 1]
    points = _contact_manifold(b, cos, sin, x, y, x1, y1, x2, y2, scratch.corners, scratch.faces, contact[row],
                               kind[row], feature[b, slot])  # fmt: skip
    kind[row, MANIFOLD_POINTS] = points
    for p in range(points):
        which = feature[b, slot, p]
        first = which == old0
        second = which == old1
        impulse[b, slot, p, IMPULSE_NORMAL] = n0 if first else n1 if second else F32_ZERO
        impulse[b, slot, p, IMPULSE_TANGENT] = t0 if first else t1 if second else F32_ZERO

    # b2ContactListener: Gymnasium's BeginContact and EndContact.
    before = touched[b, slot] == edge
    touched[b, slot] = edge if points > 0 else -1
    if points > 0 and not before:
        grounded[b] = True
    if before and points == 0 and b != BODY_LANDER:
        grounded[b] = False  # even if it stands on another edge, as in Gymnasium


@uncounted
def _contact_update_all(b, lane, lander, scratch):
    """b2ContactManager::Collide for one body; of the two edges that it may span, the even one has slot 0."""
    pose = lander.pose
    rotation = scratch.rotation
    touched = lander.touched
    first, last = _body_edges(b, pose, pose, lander.terrain)
    if first <= last:
        cos, sin = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
        _body_outline(b, cos, sin, pose[b, POSE_X], pose[b, POSE_Y], scratch.corners, scratch.faces)

    # Contacts end with edges that are out of reach; on those within reach, see what there is.
    for slot in range(2):
        scratch.contact_kind[lane, 2 * b + slot, MANIFOLD_POINTS] = 0
        old = touched[b, slot]
        if old >= 0 and not first <= old <= last:
            touched[b, slot] = -1
            if b != BODY_LANDER:
                lander.grounded[b] = False
    for edge in range(first, last + 1):
        _contact_update(b, edge % 2, edge, lane, lander, scratch)


# ---- Contacts: before the velocity iterations ----


@uncounted
def _contact_prepare(b, slot, lane, pose, rotation, impulse, c, kind, rows):
    """b2ContactSolver::InitializeVelocityConstraints and b2WorldManifold::Initialize.

    Puts what the velocity iterations need of a contact into its lane. `c` is its manifold.
    """
    at = ROW_CONTACT + kind[MANIFOLD_PLACE] * CONTACT_STRIDE + lane

    # The face, in the world.
    cos, sin = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
    origin_x, origin_y = pose[b, POSE_X] + sin * BODY_CENTER[b], pose[b, POSE_Y] - cos * BODY_CENTER[b]
    nx, ny = c[MANIFOLD_NX], c[MANIFOLD_NY]
    plane_x, plane_y = c[MANIFOLD_X], c[MANIFOLD_Y]
    if kind[MANIFOLD_KIND] == MANIFOLD_ON_BODY:
        nx, ny = cos * nx - sin * ny, sin * nx + cos * ny
        plane_x, plane_y = cos * plane_x - sin * plane_y + origin_x, sin * plane_x + cos * plane_y + origin_y

    # Each point, midway between the two surfaces, and its effective masses.
    m_b = BODY_INV_MASS[b]
    i_b = BODY_INV_INERTIA[b]
    across0 = F32_ZERO
    across1 = F32_ZERO
    points = kind[MANIFOLD_POINTS]
    for p in range(points):
        px, py = c[MANIFOLD_POINT_X + 2 * p], c[MANIFOLD_POINT_Y + 2 * p]
        if kind[MANIFOLD_KIND] == MANIFOLD_ON_EDGE:
            px, py = cos * px - sin * py + origin_x, sin * px + cos * py + origin_y
        depth = BOX2D_SKIN - ((px - plane_x) * nx + (py - plane_y) * ny)
        px = F32_HALF * (px + depth * nx + (px - BOX2D_SKIN * nx))
        py = F32_HALF * (py + depth * ny + (py - BOX2D_SKIN * ny))
        rx, ry = px - pose[b, POSE_X], py - pose[b, POSE_Y]
        across = rx * ny - ry * nx
        along = rx * nx + ry * ny
        across0 = across1
        across1 = across
        of = at + CONTACT_POINT_STRIDE * p
        rows[of + CONTACT_ARM_X], rows[of + CONTACT_ARM_Y] = rx, ry
        rows[of + CONTACT_NORMAL_MASS] = F32_ONE / (m_b + i_b * across * across)
        rows[of + CONTACT_TANGENT_MASS] = F32_ONE / (m_b + i_b * along * along)
        rows[of + CONTACT_NORMAL_IMPULSE] = impulse[b, slot, p, IMPULSE_NORMAL]
        rows[of + CONTACT_TANGENT_IMPULSE] = impulse[b, slot, p, IMPULSE_TANGENT]
    if kind[MANIFOLD_KIND] == MANIFOLD_ON_BODY:
        nx, ny = -nx, -ny
    rows[at + CONTACT_NORMAL_X], rows[at + CONTACT_NORMAL_Y] = nx, ny

    # Two points are solved together, but for those that are all but one: the second is left out, as is a missing one.
    k11 = m_b + i_b * across0 * across0
    k12 = m_b + i_b * across0 * across1
    k22 = m_b + i_b * across1 * across1
    det = k11 * k22 - k12 * k12
    kind[MANIFOLD_SOLVED] = 2 if points == 2 and k11 * k11 < BOX2D_MAX_CONDITION * det else 1
    rows[at + CONTACT_TWO_POINTS] = F32_ZERO
    if kind[MANIFOLD_SOLVED] == 2:
        inv = F32_ONE / det
        rows[at + CONTACT_TWO_POINTS] = F32_ONE
        rows[at + CONTACT_N11] = k11
        rows[at + CONTACT_N12] = k12
        rows[at + CONTACT_N22] = k22
        rows[at + CONTACT_M11] = inv * k22
        rows[at + CONTACT_M12] = -inv * k12
        rows[at + CONTACT_M22] = inv * k11
    else:
        for r in range(CONTACT_POINT_END, CONTACT_STRIDE, LANDER_LANES):
            rows[at + r] = F32_ZERO


@uncounted
def _contact_warm_start(b, place, lane, velocity, rows):
    """b2ContactSolver::WarmStart: the impulses of the last step once more, as a first guess."""
    at = ROW_CONTACT + place * CONTACT_STRIDE + lane
    nx, ny = rows[at + CONTACT_NORMAL_X], rows[at + CONTACT_NORMAL_Y]
    for p in range(2):
        of = at + CONTACT_POINT_STRIDE * p
        normal = rows[of + CONTACT_NORMAL_IMPULSE]
        tangent = rows[of + CONTACT_TANGENT_IMPULSE]
        x, y = normal * nx + tangent * ny, normal * ny - tangent * nx
        velocity[b, POSE_ANGLE] += BODY_INV_INERTIA[b] * (rows[of + CONTACT_ARM_X] * y - rows[of + CONTACT_ARM_Y] * x)
        velocity[b, POSE_X] += BODY_INV_MASS[b] * x
        velocity[b, POSE_Y] += BODY_INV_MASS[b] * y


# ---- Contacts: velocity iterations, in lanes ----


@inlined
def _contact_friction(b, slot, p, lanes, rows):
    """b2ContactSolver::SolveVelocityConstraints in the first `lanes` lanes, its first half: friction at one point.

    Where there is no contact, or no second point, the masses are zero, and so is what it does.
    """
    m_b = BODY_INV_MASS[b]
    i_b = BODY_INV_INERTIA[b]
    friction = BODY_FRICTION[b]
    for lane in range(lanes):
        at_b = ROW_VELOCITY + b * VELOCITY_STRIDE + lane
        at = ROW_CONTACT + (2 * b + slot) * CONTACT_STRIDE + lane
        of = at + CONTACT_POINT_STRIDE * p
        nx, ny = rows[at + CONTACT_NORMAL_X], rows[at + CONTACT_NORMAL_Y]
        rx, ry = rows[of + CONTACT_ARM_X], rows[of + CONTACT_ARM_Y]
        vx, vy = rows[at_b + ROW_X], rows[at_b + ROW_Y]
        w = rows[at_b + ROW_ANGLE]

        # Against the velocity along the ground, and at most `friction` times what presses on it.
        sliding = (vx - w * ry) * ny - (vy + w * rx) * nx
        most = friction * rows[of + CONTACT_NORMAL_IMPULSE]
        old = rows[of + CONTACT_TANGENT_IMPULSE]
        new = _clamp(old - rows[of + CONTACT_TANGENT_MASS] * sliding, -most, most)
        rows[of + CONTACT_TANGENT_IMPULSE] = new

        # The impulse, and what it does to the body.
        x, y = (new - old) * ny, (old - new) * nx
        rows[at_b + ROW_X] = vx + m_b * x
        rows[at_b + ROW_Y] = vy + m_b * y
        rows[at_b + ROW_ANGLE] = w + i_b * (rx * y - ry * x)


@inlined
def _contact_normal(b, slot, lanes, rows):
    """The second half where some lane has two points: the impulses along the normal, of both together."""
    m_b = BODY_INV_MASS[b]
    i_b = BODY_INV_INERTIA[b]
    for lane in range(lanes):
        at_b = ROW_VELOCITY + b * VELOCITY_STRIDE + lane
        at = ROW_CONTACT + (2 * b + slot) * CONTACT_STRIDE + lane
        nx, ny = rows[at + CONTACT_NORMAL_X], rows[at + CONTACT_NORMAL_Y]
        vx, vy = rows[at_b + ROW_X], rows[at_b + ROW_Y]
        w = rows[at_b + ROW_ANGLE]
        rx1, ry1 = rows[at + CONTACT_ARM_X], rows[at + CONTACT_ARM_Y]
        old1 = rows[at + CONTACT_NORMAL_IMPULSE]
        mass1 = rows[at + CONTACT_NORMAL_MASS]
        n12 = rows[at + CONTACT_N12]
        of = at + CONTACT_POINT_STRIDE
        rx2, ry2 = rows[of + CONTACT_ARM_X], rows[of + CONTACT_ARM_Y]
        old2 = rows[of + CONTACT_NORMAL_IMPULSE]

        # The velocities of the points away from the ground; the impulse at point 1 where it is solved alone.
        approach1 = (vx - w * ry1) * nx + (vy + w * rx1) * ny
        approach2 = (vx - w * ry2) * nx + (vy + w * rx2) * ny
        single = max(old1 - mass1 * approach1, F32_ZERO)

        # For two points, the first that holds of: both push, only the first, only the second, neither; else leave it.
        # (b1, b2) are the velocities without the impulses. In lanes nothing branches: the first to hold comes last.
        b1 = approach1 - (rows[at + CONTACT_N11] * old1 + n12 * old2)
        b2 = approach2 - (n12 * old1 + rows[at + CONTACT_N22] * old2)
        both1 = -(rows[at + CONTACT_M11] * b1 + rows[at + CONTACT_M12] * b2)
        both2 = -(rows[at + CONTACT_M12] * b1 + rows[at + CONTACT_M22] * b2)
        only1 = -mass1 * b1
        only2 = -rows[of + CONTACT_NORMAL_MASS] * b2
        neither = (b1 >= F32_ZERO) & (b2 >= F32_ZERO)
        new1 = F32_ZERO if neither else old1
        new2 = F32_ZERO if neither else old2
        second = (only2 >= F32_ZERO) & (n12 * only2 + b1 >= F32_ZERO)
        new1 = F32_ZERO if second else new1
        new2 = only2 if second else new2
        first = (only1 >= F32_ZERO) & (n12 * only1 + b2 >= F32_ZERO)
        new1 = only1 if first else new1
        new2 = F32_ZERO if first else new2
        both = (both1 >= F32_ZERO) & (both2 >= F32_ZERO)
        new1 = both1 if both else new1
        new2 = both2 if both else new2
        two = rows[at + CONTACT_TWO_POINTS] > F32_ZERO
        new1 = new1 if two else single
        new2 = new2 if two else F32_ZERO
        rows[at + CONTACT_NORMAL_IMPULSE] = new1
        rows[of + CONTACT_NORMAL_IMPULSE] = new2

        # The impulses, and what they do to the body.
        x1, y1 = (new1 - old1) * nx, (new1 - old1) * ny
        x2, y2 = (new2 - old2) * nx, (new2 - old2) * ny
        rows[at_b + ROW_X] = vx + m_b * (x1 + x2)
        rows[at_b + ROW_Y] = vy + m_b * (y1 + y2)
        rows[at_b + ROW_ANGLE] = w + i_b * (rx1 * y1 - ry1 * x1 + (rx2 * y2 - ry2 * x2))


@inlined
def _contact_normal_single(b, slot, lanes, rows):
    """The second half where no lane has two points."""
    m_b = BODY_INV_MASS[b]
    i_b = BODY_INV_INERTIA[b]
    for lane in range(lanes):
        at_b = ROW_VELOCITY + b * VELOCITY_STRIDE + lane
        at = ROW_CONTACT + (2 * b + slot) * CONTACT_STRIDE + lane
        nx, ny = rows[at + CONTACT_NORMAL_X], rows[at + CONTACT_NORMAL_Y]
        vx, vy = rows[at_b + ROW_X], rows[at_b + ROW_Y]
        w = rows[at_b + ROW_ANGLE]
        rx, ry = rows[at + CONTACT_ARM_X], rows[at + CONTACT_ARM_Y]
        old = rows[at + CONTACT_NORMAL_IMPULSE]
        approach = (vx - w * ry) * nx + (vy + w * rx) * ny
        new = max(old - rows[at + CONTACT_NORMAL_MASS] * approach, F32_ZERO)
        rows[at + CONTACT_NORMAL_IMPULSE] = new
        x, y = (new - old) * nx, (new - old) * ny
        rows[at_b + ROW_X] = vx + m_b * x
        rows[at_b + ROW_Y] = vy + m_b * y
        rows[at_b + ROW_ANGLE] = w + i_b * (rx * y - ry * x)


@uncounted
def _contact_velocity(b, slot, two_points, lanes, rows):
    """b2ContactSolver::SolveVelocityConstraints, both halves; `two_points`: any of these lanes has a contact of two."""
    _contact_friction(b, slot, 0, lanes, rows)
    if two_points:
        _contact_friction(b, slot, 1, lanes, rows)
        _contact_normal(b, slot, lanes, rows)
    else:
        _contact_normal_single(b, slot, lanes, rows)


# ---- Contacts: position iterations ----


@uncounted
def _contact_position(b, pose, c, kind, baumgarte):
    """b2ContactSolver::SolvePositionConstraints: push a body out of an edge. `c` is their manifold.

    Returns the least gap that it found between the surfaces, 0 or below [m].
    """
    deepest = F32_ZERO
    for p in range(kind[MANIFOLD_POINTS]):
        # Face and point in the world; the last point has moved the body.
        cos, sin = math.cos(pose[b, POSE_ANGLE]), math.sin(pose[b, POSE_ANGLE])
        origin_x, origin_y = pose[b, POSE_X] + sin * BODY_CENTER[b], pose[b, POSE_Y] - cos * BODY_CENTER[b]
        nx, ny = c[MANIFOLD_NX], c[MANIFOLD_NY]
        plane_x, plane_y = c[MANIFOLD_X], c[MANIFOLD_Y]
        px, py = c[MANIFOLD_POINT_X + 2 * p], c[MANIFOLD_POINT_Y + 2 * p]
        if kind[MANIFOLD_KIND] == MANIFOLD_ON_EDGE:
            px, py = cos * px - sin * py + origin_x, sin * px + cos * py + origin_y
        else:
            nx, ny = cos * nx - sin * ny, sin * nx + cos * ny
            plane_x, plane_y = (
                cos * plane_x - sin * plane_y + origin_x,
                sin * plane_x + cos * plane_y + origin_y,
            )
        gap = (px - plane_x) * nx + (py - plane_y) * ny - BOX2D_SKIN - BOX2D_SKIN
        if kind[MANIFOLD_KIND] == MANIFOLD_ON_BODY:
            nx, ny = -nx, -ny
        deepest = min(deepest, gap)

        # A share of what is too deep, by moving and turning the body.
        rx, ry = px - pose[b, POSE_X], py - pose[b, POSE_Y]
        across = rx * ny - ry * nx
        push = -_clamp(baumgarte * (gap + BOX2D_LINEAR_SLOP), -BOX2D_MAX_CORRECTION, F32_ZERO) / (
            BODY_INV_MASS[b] + BODY_INV_INERTIA[b] * across * across
        )
        x, y = push * nx, push * ny
        pose[b, POSE_X] += BODY_INV_MASS[b] * x
        pose[b, POSE_Y] += BODY_INV_MASS[b] * y
        pose[b, POSE_ANGLE] += BODY_INV_INERTIA[b] * (rx * y - ry * x)
    return deepest


# ---- Impacts within a step ----


@uncounted
def _impact_distance(b, t, start, pose, x1, y1, x2, y2, corners, faces):
    """b2Distance: how far a body is from an edge at the fraction t of its way, and along which axis they separate.

    Returns the distance, 0 if they overlap [m]; the axis, from edge to body; and the body's face that the axis is
    normal to, and turns with, or -1 if the axis does not turn with the body.
    """
    x = (F32_ONE - t) * start[b, POSE_X] + t * pose[b, POSE_X]
    y = (F32_ONE - t) * start[b, POSE_Y] + t * pose[b, POSE_Y]
    angle = (F32_ONE - t) * start[b, POSE_ANGLE] + t * pose[b, POSE_ANGLE]
    _body_outline(b, math.cos(angle), math.sin(angle), x, y, corners, faces)
    n = BODY_N_CORNERS[b]

    # They overlap if neither the edge's line nor any face has all of the other on its far side.
    ex, ey = x2 - x1, y2 - y1
    length = math.sqrt(ex * ex + ey * ey)
    nx, ny = -ey / length, ex / length
    above = F32_INF
    below = F32_INF
    apart = False
    for i in range(n):
        gap = nx * (corners[i, 0] - x1) + ny * (corners[i, 1] - y1)
        above = min(above, gap)
        below = min(below, -gap)
        gap1 = faces[i, 0] * (x1 - corners[i, 0]) + faces[i, 1] * (y1 - corners[i, 1])
        gap2 = faces[i, 0] * (x2 - corners[i, 0]) + faces[i, 1] * (y2 - corners[i, 1])
        apart = apart or min(gap1, gap2) > F32_ZERO
    if not apart and above <= F32_ZERO and below <= F32_ZERO:
        return F32_ZERO, nx, ny, -1

    # The nearest of: a corner and an end of the edge, a corner and the edge's line, an end and a face.
    least = F32_INF
    face = -1
    ax, ay = nx, ny
    for i in range(n):
        px, py = corners[i, 0] - x1, corners[i, 1] - y1
        along = (px * ex + py * ey) / (length * length)
        if along < F32_ZERO or along > F32_ONE:
            along = _clamp(along, F32_ZERO, F32_ONE)
            px, py = px - along * ex, py - along * ey
            gap = math.sqrt(px * px + py * py)
            if gap < least:
                least = gap
                face = -1
                ax, ay = px / gap, py / gap
        else:
            gap = nx * px + ny * py
            if abs(gap) < least:
                least = abs(gap)
                face = -1
                ax, ay = (nx, ny) if gap > F32_ZERO else (-nx, -ny)
        j = i + 1 if i + 1 < n else 0
        sx, sy = corners[j, 0] - corners[i, 0], corners[j, 1] - corners[i, 1]
        for end in range(2):
            px, py = (x1, y1) if end == 0 else (x2, y2)
            px, py = px - corners[i, 0], py - corners[i, 1]
            along = px * sx + py * sy
            gap = faces[i, 0] * px + faces[i, 1] * py
            if along > F32_ZERO and along < sx * sx + sy * sy and gap > F32_ZERO and gap < least:
                least = gap
                face = i
    return least, ax, ay, face


@uncounted
def _impact_gap(b, witness, t, ax, ay, face, start, pose, x1, y1, x2, y2):
    """b2SeparationFunction: the gap between body and edge along an axis of `_impact_distance`, at the fraction t.

    It is that of one corner, or end of the edge if the axis turns with a face: of `witness`, or if this is -1 of the
    nearest. Returns the gap [m] and which it was.
    """
    x = (F32_ONE - t) * start[b, POSE_X] + t * pose[b, POSE_X]
    y = (F32_ONE - t) * start[b, POSE_Y] + t * pose[b, POSE_Y]
    angle = (F32_ONE - t) * start[b, POSE_ANGLE] + t * pose[b, POSE_ANGLE]
    return _impact_gap_at(b, witness, x, y, math.cos(angle), math.sin(angle), ax, ay, face, x1, y1, x2, y2)


@uncounted
def _impact_gap_at(b, witness, x, y, cos, sin, ax, ay, face, x1, y1, x2, y2):
    """`_impact_gap` for one pose of the body."""
    x, y = x + sin * BODY_CENTER[b], y - cos * BODY_CENTER[b]
    least = F32_INF
    found = 0
    if face < 0:
        offset = max(ax * x1 + ay * y1, ax * x2 + ay * y2)
        for i in range(BODY_N_CORNERS[b]):
            if witness < 0 or i == witness:
                px = cos * BODY_CORNERS[b, i, 0] - sin * BODY_CORNERS[b, i, 1] + x
                py = sin * BODY_CORNERS[b, i, 0] + cos * BODY_CORNERS[b, i, 1] + y
                gap = ax * px + ay * py - offset
                if gap < least:
                    least = gap
                    found = i
    else:
        nx = cos * BODY_FACES[b, face, 0] - sin * BODY_FACES[b, face, 1]
        ny = sin * BODY_FACES[b, face, 0] + cos * BODY_FACES[b, face, 1]
        px = cos * BODY_CORNERS[b, face, 0] - sin * BODY_CORNERS[b, face, 1] + x
        py = sin * BODY_CORNERS[b, face, 0] + cos * BODY_CORNERS[b, face, 1] + y
        for end in range(2):
            if witness < 0 or end == witness:
                gap = nx * (x1 - px) + ny * (y1 - py) if end == 0 else nx * (x2 - px) + ny * (y2 - py)
                if gap < least:
                    least = gap
                    found = end
    return least, found


@uncounted
def _impact_time(b, start, pose, cos, sin, x1, y1, x2, y2, corners, faces):
    """b2TimeOfImpact: the fraction of a body's way from `start` to `pose` after which it hits an edge; 1 if never.

    `cos` and `sin` are of the angle at the end of the way.
    """
    # Most often the edge's own line keeps them apart, before and after.
    inv = F32_ONE / math.sqrt((x2 - x1) * (x2 - x1) + (y2 - y1) * (y2 - y1))
    ax, ay = (y1 - y2) * inv, (x2 - x1) * inv
    after, _ = _impact_gap_at(b, -1, pose[b, POSE_X], pose[b, POSE_Y], cos, sin, ax, ay, -1, x1, y1, x2, y2)
    if after > TOI_TARGET + TOI_TOLERANCE:
        x, y = start[b, POSE_X], start[b, POSE_Y]
        cos, sin = start[b, POSE_COS], start[b, POSE_SIN]
        before, _ = _impact_gap_at(b, -1, x, y, cos, sin, ax, ay, -1, x1, y1, x2, y2)
        if before > TOI_TARGET + TOI_TOLERANCE:
            return F32_ONE

    # Advance t1 as long as some axis separates them: find t2, when this axis does so no more, and go on from there.
    t1 = F32_ZERO
    for _ in range(TOI_ITERATIONS):
        distance, ax, ay, face = _impact_distance(b, t1, start, pose, x1, y1, x2, y2, corners, faces)
        if distance <= F32_ZERO:
            return F32_ONE
        if distance < TOI_TARGET + TOI_TOLERANCE:
            return t1

        # On this axis, push t2 back until the corner that sinks in deepest at t2 only just touches.
        t2 = F32_ONE
        for _ in range(TOI_PUSHES):
            s2, witness = _impact_gap(b, -1, t2, ax, ay, face, start, pose, x1, y1, x2, y2)
            if s2 > TOI_TARGET + TOI_TOLERANCE:
                return F32_ONE
            if s2 > TOI_TARGET - TOI_TOLERANCE:
                t1 = t2
                break
            s1, _ = _impact_gap(b, witness, t1, ax, ay, face, start, pose, x1, y1, x2, y2)
            if s1 < TOI_TARGET - TOI_TOLERANCE:
                return F32_ONE
            if s1 <= TOI_TARGET + TOI_TOLERANCE:
                return t1

            # When this corner, or end, touches: bisection and secant rule in turn.
            low, high = t1, t2
            for trial in range(TOI_ROOT_ITERATIONS):
                t = low + (TOI_TARGET - s1) * (high - low) / (s2 - s1) if trial % 2 == 1 else F32_HALF * (low + high)
                s, _ = _impact_gap(b, witness, t, ax, ay, face, start, pose, x1, y1, x2, y2)
                if abs(s - TOI_TARGET) < TOI_TOLERANCE:
                    t2 = t
                    break
                if s > TOI_TARGET:
                    low = t
                    s1 = s
                else:
                    high = t
                    s2 = s
    return F32_ONE


@uncounted
def _impact_solve(b, lane, lander, scratch):
    """b2World::SolveTOI for one body: stop it where it first hits an edge, and let it go on from there.

    Without this, what falls fast would sink in by a whole step's way before it is noticed. Box2D lets go of the joints
    meanwhile; they pull together in the next step.
    """
    pose = lander.pose
    velocity = lander.velocity
    terrain = lander.terrain
    rows = scratch.impact_rows
    rotation = scratch.rotation
    corners = scratch.corners
    faces = scratch.faces
    start = scratch.start[lane]
    contact = scratch.contact[lane]
    kind = scratch.contact_kind[lane]
    first, last = _body_edges(b, start, pose, terrain)
    done = F32_ZERO
    kind[2 * b, MANIFOLD_HITS] = 0
    kind[2 * b + 1, MANIFOLD_HITS] = 0
    while True:
        # The edge that it hits first, and when, as a fraction of the whole step.
        cos, sin = math.cos(pose[b, POSE_ANGLE]), math.sin(pose[b, POSE_ANGLE])
        soonest = F32_ONE
        which = -1
        for edge in range(first, last + 1):
            if kind[2 * b + edge % 2, MANIFOLD_HITS] <= TOI_HITS:
                x1 = f32(edge) * MOON_CHUNK_WIDTH
                x2 = f32(edge + 1) * MOON_CHUNK_WIDTH
                t = _impact_time(b, start, pose, cos, sin, x1, terrain[edge], x2, terrain[edge + 1], corners, faces)
                t = min(done + (F32_ONE - done) * t, F32_ONE) if t < F32_ONE else F32_ONE
                if t < soonest:
                    soonest = t
                    which = edge
        if which < 0 or soonest > TOI_END:
            return

        # Set it back to there.
        beta = (soonest - done) / (F32_ONE - done)
        x, y = pose[b, POSE_X], pose[b, POSE_Y]
        angle = pose[b, POSE_ANGLE]
        for i in range(3):
            pose[b, i] = (F32_ONE - beta) * start[b, i] + beta * pose[b, i]
        _body_rotate(b, pose, rotation)
        cos, sin = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
        _body_outline(b, cos, sin, pose[b, POSE_X], pose[b, POSE_Y], corners, faces)
        slot = which % 2
        _contact_update(b, slot, which, lane, lander, scratch)
        kind[2 * b + slot, MANIFOLD_HITS] += 1
        if kind[2 * b + slot, MANIFOLD_POINTS] == 0:  # near, but not touching: look no more
            pose[b, POSE_X], pose[b, POSE_Y] = x, y
            pose[b, POSE_ANGLE] = angle
            kind[2 * b + slot, MANIFOLD_HITS] = TOI_HITS + 1
            continue
        done = soonest
        for edge in range(first, last + 1):
            if edge != which:
                _contact_update(b, edge % 2, edge, lane, lander, scratch)

        # Position iterations, of this body alone; the edge that was hit comes first.
        for _ in range(TOI_POSITION_ITERATIONS):
            deepest = F32_ZERO
            for s in range(2):
                s = slot if s == 0 else 1 - slot
                row = 2 * b + s
                if kind[row, MANIFOLD_POINTS] > 0:
                    deepest = min(deepest, _contact_position(b, pose, contact[row], kind[row], TOI_BAUMGARTE))
            if deepest >= f32(-1.5) * BOX2D_LINEAR_SLOP:
                break

        # The rest of the step starts here.
        _body_rotate(b, pose, rotation)
        start[b, POSE_X], start[b, POSE_Y] = pose[b, POSE_X], pose[b, POSE_Y]
        start[b, POSE_ANGLE] = pose[b, POSE_ANGLE]
        start[b, POSE_COS], start[b, POSE_SIN] = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]

        # Velocity iterations, in a lane of its own, without impulses of the last step.
        for i in range(3):
            rows[ROW_VELOCITY + b * VELOCITY_STRIDE + i * LANDER_LANES] = velocity[b, i]
        for s in range(2):
            row = 2 * b + s
            if kind[row, MANIFOLD_POINTS] > 0:
                kind[row, MANIFOLD_PLACE] = row
                _contact_prepare(b, s, 0, pose, rotation, CONTACT_NO_IMPULSE, contact[row], kind[row], rows)
        for _ in range(BOX2D_VELOCITY_ITERATIONS):
            vx, vy = velocity[b, POSE_X], velocity[b, POSE_Y]
            w = velocity[b, POSE_ANGLE]
            for s in range(2):
                s = slot if s == 0 else 1 - slot
                if kind[2 * b + s, MANIFOLD_POINTS] > 0:
                    _contact_velocity(b, s, kind[2 * b + s, MANIFOLD_SOLVED] == 2, 1, rows)
            for i in range(3):
                velocity[b, i] = rows[ROW_VELOCITY + b * VELOCITY_STRIDE + i * LANDER_LANES]
            if vx == velocity[b, POSE_X] and vy == velocity[b, POSE_Y] and w == velocity[b, POSE_ANGLE]:
                break  # nothing would change any more

        # The rest of its way.
        _body_move(b, pose, velocity, (F32_ONE - soonest) * BOX2D_TIME_STEP)


# ---- One physics step: load, iterate, unload ----


@uncounted
def _lander_load(lane, force_x, force_y, torque, gravity, lander, scratch):
    """b2World::Step up to the velocity iterations: contacts of the poses as they are, forces, warm start.

    `scratch.rotation` holds cos and sin of these poses' angles. The force [N] and the torque [N m] act on the lander.
    """
    pose = lander.pose
    velocity = lander.velocity
    terrain = lander.terrain
    joint_impulse = lander.joint_impulse
    joint_limit = lander.joint_limit
    impulse = lander.contact_impulse
    rotation = scratch.rotation
    rows = scratch.rows
    start = scratch.start[lane]
    contact = scratch.contact[lane]
    kind = scratch.contact_kind[lane]

    # Contacts, if the ground may be within reach.
    x = (pose[BODY_LANDER, POSE_X] + rotation[BODY_LANDER, ROTATION_SIN] * BODY_CENTER[BODY_LANDER]) / MOON_CHUNK_WIDTH
    ground = F32_ZERO
    for i in range(max(int(x - LANDER_REACH), 0), min(int(x + LANDER_REACH) + 1, MOON_CHUNKS) + 1):
        ground = max(ground, terrain[i])
    scratch.near[lane] = pose[BODY_LANDER, POSE_Y] - LANDER_REACH * MOON_CHUNK_WIDTH < ground
    for row in range(2 * LANDER_BODIES):
        kind[row, MANIFOLD_POINTS] = 0
    if scratch.near[lane]:
        for nth in range(LANDER_BODIES):
            _contact_update_all(BODY_SOLVE_ORDER[nth], lane, lander, scratch)

    # Where the step began, for the impacts; forces.
    for b in range(LANDER_BODIES):
        start[b, POSE_X], start[b, POSE_Y] = pose[b, POSE_X], pose[b, POSE_Y]
        start[b, POSE_ANGLE] = pose[b, POSE_ANGLE]
        start[b, POSE_COS], start[b, POSE_SIN] = rotation[b, ROTATION_COS], rotation[b, ROTATION_SIN]
    velocity[BODY_RIGHT_LEG, POSE_Y] += BOX2D_TIME_STEP * f32(gravity)
    velocity[BODY_LEFT_LEG, POSE_Y] += BOX2D_TIME_STEP * f32(gravity)
    velocity[BODY_LANDER, POSE_X] += BOX2D_TIME_STEP * (BODY_INV_MASS[BODY_LANDER] * f32(force_x))
    velocity[BODY_LANDER, POSE_Y] += BOX2D_TIME_STEP * (f32(gravity) + BODY_INV_MASS[BODY_LANDER] * f32(force_y))
    velocity[BODY_LANDER, POSE_ANGLE] += BOX2D_TIME_STEP * BODY_INV_INERTIA[BODY_LANDER] * f32(torque)

    # Contacts into the lane, one body's to its first free places; then their first guess, after all have been prepared.
    if scratch.near[lane]:
        for nth in range(LANDER_BODIES):
            b = BODY_SOLVE_ORDER[nth]
            place = 2 * b
            for row in range(2 * b, 2 * b + 2):
                if kind[row, MANIFOLD_POINTS] > 0:
                    kind[row, MANIFOLD_PLACE] = place
                    _contact_prepare(b, row % 2, lane, pose, rotation, impulse, contact[row], kind[row], rows)
                    scratch.solving[place, SOLVING_LANES] += 1
                    scratch.solving[place, SOLVING_TWO_POINTS] += kind[row, MANIFOLD_SOLVED] == 2
                    place += 1
        for nth in range(LANDER_BODIES):
            b = BODY_SOLVE_ORDER[nth]
            for row in range(2 * b, 2 * b + 2):
                if kind[row, MANIFOLD_POINTS] > 0:
                    _contact_warm_start(b, kind[row, MANIFOLD_PLACE], lane, velocity, rows)

    # Joints into the lane, the left one first; then the velocities and impulses that the iterations change.
    _joint_prepare(LEG_LEFT, lane, pose, velocity, rotation, joint_impulse, joint_limit, rows)
    _joint_prepare(LEG_RIGHT, lane, pose, velocity, rotation, joint_impulse, joint_limit, rows)
    for b in range(LANDER_BODIES):
        for i in range(3):
            rows[ROW_VELOCITY + b * VELOCITY_STRIDE + i * LANDER_LANES + lane] = velocity[b, i]
    for k in range(LANDER_LEGS):
        for i in range(4):
            rows[ROW_IMPULSE + k * IMPULSE_STRIDE + i * LANDER_LANES + lane] = joint_impulse[k, i]


@uncounted
def _lander_iterate(rows, solving):
    """The velocity iterations of b2Island::Solve, in all lanes at once: left joint, right joint, then the contacts.

    A body and slot that has no contact in any lane is left out. Row 2 * body + slot of `solving` says so.
    """
    for _ in range(BOX2D_VELOCITY_ITERATIONS):
        _joint_velocity(LEG_LEFT, rows)
        _joint_velocity(LEG_RIGHT, rows)
        if solving[4, SOLVING_LANES] > 0:
            _contact_velocity(BODY_LEFT_LEG, 0, solving[4, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)
        if solving[5, SOLVING_LANES] > 0:
            _contact_velocity(BODY_LEFT_LEG, 1, solving[5, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)
        if solving[0, SOLVING_LANES] > 0:
            _contact_velocity(BODY_LANDER, 0, solving[0, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)
        if solving[1, SOLVING_LANES] > 0:
            _contact_velocity(BODY_LANDER, 1, solving[1, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)
        if solving[2, SOLVING_LANES] > 0:
            _contact_velocity(BODY_RIGHT_LEG, 0, solving[2, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)
        if solving[3, SOLVING_LANES] > 0:
            _contact_velocity(BODY_RIGHT_LEG, 1, solving[3, SOLVING_TWO_POINTS] > 0, LANDER_LANES, rows)


@uncounted
def _lander_unload(lane, lander, scratch):
    """The rest of b2World::Step: out of the lane, move, mend the positions, sleep, and what was hit on the way.

    Returns whether the lander has fallen asleep.
    """
    pose = lander.pose
    velocity = lander.velocity
    still = lander.still
    rows = scratch.rows
    joint_impulse = lander.joint_impulse
    joint_limit = lander.joint_limit
    impulse = lander.contact_impulse
    contact = scratch.contact[lane]
    kind = scratch.contact_kind[lane]

    # Velocities and impulses out of the lane; its contacts are cleared for whoever comes next.
    for b in range(LANDER_BODIES):
        for i in range(3):
            velocity[b, i] = rows[ROW_VELOCITY + b * VELOCITY_STRIDE + i * LANDER_LANES + lane]
    for k in range(LANDER_LEGS):
        for i in range(4):
            joint_impulse[k, i] = rows[ROW_IMPULSE + k * IMPULSE_STRIDE + i * LANDER_LANES + lane]
    touching = False
    for row in range(2 * LANDER_BODIES):
        if kind[row, MANIFOLD_POINTS] > 0:
            touching = True
            place = kind[row, MANIFOLD_PLACE]
            scratch.solving[place, SOLVING_LANES] -= 1
            scratch.solving[place, SOLVING_TWO_POINTS] -= kind[row, MANIFOLD_SOLVED] == 2
            at = ROW_CONTACT + place * CONTACT_STRIDE + lane
            for p in range(kind[row, MANIFOLD_SOLVED]):
                of = at + CONTACT_POINT_STRIDE * p
                impulse[row // 2, row % 2, p, IMPULSE_NORMAL] = rows[of + CONTACT_NORMAL_IMPULSE]
                impulse[row // 2, row % 2, p, IMPULSE_TANGENT] = rows[of + CONTACT_TANGENT_IMPULSE]
            for r in range(0, CONTACT_STRIDE, LANDER_LANES):
                rows[at + r] = F32_ZERO

    # Move, then position iterations until nothing is too deep and no joint too far apart.
    for b in range(LANDER_BODIES):
        _body_move(b, pose, velocity, BOX2D_TIME_STEP)
    solved = False
    for _ in range(BOX2D_POSITION_ITERATIONS):
        deepest = F32_ZERO
        if touching:
            for nth in range(LANDER_BODIES):
                b = BODY_SOLVE_ORDER[nth]
                for row in range(2 * b, 2 * b + 2):
                    if kind[row, MANIFOLD_POINTS] > 0:
                        gap = _contact_position(b, pose, contact[row], kind[row], BOX2D_BAUMGARTE)
                        deepest = min(deepest, gap)
        right = _joint_position(LEG_LEFT, pose, joint_limit)
        left = _joint_position(LEG_RIGHT, pose, joint_limit)
        if right and left and deepest >= f32(-3.0) * BOX2D_LINEAR_SLOP:
            solved = True
            break

    # Sleep: positions solved, and every body at rest for long enough. Whoever is awake may have hit the ground.
    asleep = solved
    for b in range(LANDER_BODIES):
        vx, vy = velocity[b, POSE_X], velocity[b, POSE_Y]
        w = velocity[b, POSE_ANGLE]
        moving = (
            w * w > BOX2D_SLEEP_SPIN * BOX2D_SLEEP_SPIN or vx * vx + vy * vy > BOX2D_SLEEP_SPEED * BOX2D_SLEEP_SPEED
        )
        still[b] = F32_ZERO if moving else still[b] + BOX2D_TIME_STEP
        asleep = asleep and still[b] >= BOX2D_SLEEP_TIME
    if asleep:
        velocity[:] = F32_ZERO
    elif scratch.near[lane]:
        for b in range(LANDER_BODIES):
            _impact_solve(b, lane, lander, scratch)
    return asleep


# ---- Observation and reward ----


@uncounted
def _lander_view(lander, sight):
    """The observation (8,) of a lander into `sight`, in float64; for its units see `LunarLander`."""
    x, y = lander.pose[BODY_LANDER, POSE_X], lander.pose[BODY_LANDER, POSE_Y]
    angle = lander.pose[BODY_LANDER, POSE_ANGLE]
    x = np.float64(x + math.sin(angle) * BODY_CENTER[BODY_LANDER])  # of the origin, above which the centre of mass is
    y = np.float64(y - math.cos(angle) * BODY_CENTER[BODY_LANDER])
    sight[SIGHT_X] = (x - MOON_WIDTH / 2) / (MOON_WIDTH / 2)
    sight[SIGHT_Y] = (y - (MOON_PAD_HEIGHT + LEG_DOWN)) / (MOON_HEIGHT / 2)
    sight[SIGHT_VX] = np.float64(lander.velocity[BODY_LANDER, POSE_X]) * (MOON_WIDTH / 2) / LANDER_FPS
    sight[SIGHT_VY] = np.float64(lander.velocity[BODY_LANDER, POSE_Y]) * (MOON_HEIGHT / 2) / LANDER_FPS
    sight[SIGHT_ANGLE] = np.float64(angle)
    sight[SIGHT_SPIN] = 20.0 * np.float64(lander.velocity[BODY_LANDER, POSE_ANGLE]) / LANDER_FPS
    sight[SIGHT_RIGHT_LEG] = np.float64(lander.grounded[BODY_RIGHT_LEG])
    sight[SIGHT_LEFT_LEG] = np.float64(lander.grounded[BODY_LEFT_LEG])


@uncounted
def _lander_observe(state, scratch, outputs):
    """The observation of every lander as it is."""
    sight = scratch[0].sight
    for env in range(len(state)):
        _lander_view(state[env], sight)
        for i in range(SIGHT_COLUMNS):
            outputs.observations[env, i] = sight[i]


@uncounted
def _lander_shaping(sight):
    """The potential whose increase is the reward."""
    return (
        -100.0 * math.sqrt(sight[SIGHT_X] * sight[SIGHT_X] + sight[SIGHT_Y] * sight[SIGHT_Y])
        - 100.0 * math.sqrt(sight[SIGHT_VX] * sight[SIGHT_VX] + sight[SIGHT_VY] * sight[SIGHT_VY])
        - 100.0 * abs(sight[SIGHT_ANGLE])
        + 10.0 * sight[SIGHT_RIGHT_LEG]
        + 10.0 * sight[SIGHT_LEFT_LEG]
    )


@uncounted
def _lander_sparse_reward(sight, asleep):
    """The reward for a whole episode, at its end: 200 for a landing, else how near it came to one."""
    x = sight[SIGHT_X]
    speed = math.hypot(sight[SIGHT_VX], sight[SIGHT_VY])
    legs = sight[SIGHT_RIGHT_LEG] + sight[SIGHT_LEFT_LEG]
    if asleep or (legs == 2.0 and speed < 0.01 and abs(x) <= 0.2):
        return 200.0
    reward = -10.0 * speed - 10.0 * math.hypot(x, sight[SIGHT_Y]) - 10.0 * abs(sight[SIGHT_ANGLE]) + 20.0 * legs
    if abs(x) >= 1.0:
        reward -= 5.0
    if legs == 2.0:
        reward += 100.0 * max(0.0, 1.0 - math.sqrt(speed)) * max(0.0, 1.0 - x * x)
    return reward


# ---- One step of all environments ----


@uncounted
def _lander_step(actions, begin, params, state, queue, scratch, outputs):
    """One step of every environment, or with `begin` only Gymnasium's first one, that belongs to the reset.

    The velocity iterations cost the most, so LANDER_LANES environments go through them together. Those that touch the
    ground come last: then few rounds have to do with contacts. When an episode has ended, its environment goes through
    once more, for the first step of the next, beside those that still wait.

    `actions` (num_envs, 2) are throttles; `queue` (num_envs,) is room for the order of the environments.
    """
    num_envs = len(state)
    scratch = scratch[0]
    lane_env = scratch.lane_env
    fresh = scratch.fresh
    sight = scratch.sight

    # The queue: environments above the ground, then those that touch it.
    waiting = 0
    for on_ground in (False, True):
        for env in range(num_envs):
            touched = state[env].touched
            touching = False
            for b in range(LANDER_BODIES):
                touching |= touched[b, 0] >= 0 or touched[b, 1] >= 0
            if touching == on_ground:
                queue[waiting] = env
                waiting += 1

    waiting = 0
    used = 0
    while waiting < num_envs or used > 0:
        # Fill the lanes, beside the episodes that have just begun.
        while used < LANDER_LANES and waiting < num_envs:
            lane_env[used] = queue[waiting]
            fresh[used] = begin
            used += 1
            waiting += 1

        # Engines and forces, and the landers into their lanes.
        for lane in range(used):
            env = lane_env[lane]
            main = 0.0
            lateral = 0.0
            force_x, force_y = 0.0, 0.0
            if fresh[lane]:
                _lander_begin(state[env])
                force_x, force_y = state[env].push[0], state[env].push[1]
            else:
                main = np.float64(actions[env, 0])
                lateral = np.float64(actions[env, 1])
            force_x, torque = _lander_engines(env, main, lateral, force_x, params, state, scratch)
            _lander_load(lane, force_x, force_y, torque, params.gravity, state[env], scratch)

        # All at once.
        _lander_iterate(scratch.rows, scratch.solving)

        # Out of the lanes; those whose episode has ended begin the next round.
        unloading = used
        used = 0
        for lane in range(unloading):
            env = lane_env[lane]
            lander = state[env]
            asleep = _lander_unload(lane, lander, scratch)
            _lander_view(lander, sight)
            shaping = _lander_shaping(sight)
            ended = False

            if not fresh[lane]:
                # Reward, and whether the episode has ended.
                powers = lander.throttle
                reward = shaping - lander.shaping - 0.3 * powers[THROTTLE_MAIN] - 0.03 * abs(powers[THROTTLE_SIDE])
                crashed = lander.grounded[BODY_LANDER] != 0
                failed = crashed or abs(sight[SIGHT_X]) >= 1.0
                if asleep:
                    reward = 100.0
                elif failed:
                    reward = -100.0
                lander.elapsed += 1
                ended = asleep or failed or lander.elapsed >= params.max_steps
                if params.sparse_reward:
                    reward = _lander_sparse_reward(sight, asleep) if ended else 0.0

                # Totals and outputs; of an episode that has ended, the last observation and the statistics.
                lander.totals[LANDER_STAT_RETURN] += reward
                lander.totals[LANDER_STAT_LENGTH] += 1.0
                outputs.rewards[env] = reward
                outputs.terminations[env] = asleep or failed
                outputs.truncations[env] = ended and not (asleep or failed)
                if ended:
                    for i in range(SIGHT_COLUMNS):
                        outputs.final_observations[env, i] = sight[i]
                    speed = math.hypot(sight[SIGHT_VX], sight[SIGHT_VY])
                    stats = outputs.stats
                    legs = sight[SIGHT_RIGHT_LEG] + sight[SIGHT_LEFT_LEG]
                    success = legs == 2.0 and speed < 0.1 and abs(sight[SIGHT_X]) < 0.2
                    stats[env, LANDER_STAT_RETURN] = lander.totals[LANDER_STAT_RETURN]
                    stats[env, LANDER_STAT_LENGTH] = lander.totals[LANDER_STAT_LENGTH]
                    stats[env, LANDER_STAT_SUCCESS] = success
                    stats[env, LANDER_STAT_LANDED] = asleep
                    stats[env, LANDER_STAT_CRASHED] = crashed
                    stats[env, LANDER_STAT_SPEED] = speed
                    stats[env, LANDER_STAT_X] = sight[SIGHT_X]
                    _lander_draw(env, params, state, scratch)

            lander.shaping = shaping
            for i in range(SIGHT_COLUMNS):
                outputs.observations[env, i] = sight[i]
            if ended:
                lane_env[used] = env
                fresh[used] = True
                used += 1


# ---- The environment ----


class LunarLander(NativeVectorEnv):
    """Gymnasium's LunarLander-v3: land between two flags on the moon, at the origin, gently and with little fuel.

    Observation (num_envs, 8): x and y of the lander from the pad, in half-widths of the view and in half-heights; its
    velocity, of which 1 is 5 m/s along x and 7.5 m/s along y; angle [rad]; angular velocity, of which 1 is 2.5 rad/s;
    whether the right and the left leg (Gymnasium's legs 0 and 1) touch the ground. Action: Discrete(4), nothing, left,
    main or right engine; with `continuous` (num_envs, 2) in [-1, 1], main engine (off below 0, then half to full power)
    and side engines (off between -0.5 and 0.5). Gravity is in [-12, 0] m/s^2; with `enable_wind` gusts up to
    `wind_power` [N] and `turbulence_power` [N m] act on the lander until a leg touches the ground.

    Reward: the increase of -100 distance - 100 speed - 100 |angle| + 10 per leg on the ground, minus 0.3 times the main
    and 0.03 times the side engine's power; instead of it -100 for a crash (the hull touches the ground, or |x| >= 1)
    and 100 for coming to rest (Box2D's sleep, half a second without motion). These two end an episode, by termination;
    `max_steps` ends it by truncation.

    Every episode starts at the top, in the middle, upright. `randomize_spawn` (on in `DenseLunarLander` and
    `SparseLunarLander`) starts it anywhere in x from 0.1 to 0.9 of the view's width, y from 0.7 to 1 of its height and
    angle from -0.25 to 0.25 rad. `sparse_reward` (`SparseLunarLander`) gives nothing until the episode ends, then 200
    if it is at rest, or has both legs down at speed < 0.01 and |x| <= 0.2; else, with all in observation units,

        -10 speed - 10 distance - 10 |angle| + 20 legs - 5 [|x| >= 1]
        + 100 [both legs] max(0, 1 - sqrt(speed)) max(0, 1 - x^2)

    Episode statistics: "r", "l", and from the last observation "success" (both legs down, speed < 0.1, |x| < 0.2),
    "landed" (came to rest), "crashed" (the hull touched the ground), "speed" and "x", all in observation units.

    `reset(options={"terrain": (num_envs, 12), "push": (num_envs, 2), "position": (num_envs, 2), "angle": (num_envs,)})`
    gives any part of the start: raw heights [m] as Gymnasium draws them, the force in the first step [N], the lander's
    origin from the view's lower left corner [m] and its angle [rad]. The episodes after it start at random again.

    With the same draws a flight equals Box2D's to the last bit of float32, but for rare ones, and so do most landings.
    What differs: where a body hits the ground within a step, to Box2D's own tolerance of a millimetre; the order of the
    two contacts of a body that stands on two edges; and Box2D's flat edge at height 0, under the terrain, is left out.
    """

    metadata = {**NativeVectorEnv.metadata, "render_fps": LANDER_FPS}
    stat_names = ("r", "l", "success", "landed", "crashed", "speed", "x")

    def __init__(
        self,
        num_envs=1,
        continuous=False,
        gravity=-10.0,
        enable_wind=False,
        wind_power=15.0,
        turbulence_power=1.5,
        randomize_spawn=False,
        sparse_reward=False,
        max_steps=1000,
        render_mode=None,
        first_env=0,
    ):
        switches = dict(continuous=continuous, enable_wind=enable_wind, randomize_spawn=randomize_spawn,
                        sparse_reward=sparse_reward)  # fmt: skip
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}: it must be True or False")
        self.continuous = continuous
        self.params = LanderParams(
            gravity=_number("gravity", gravity, -12.0, 0.0),
            wind_power=_number("wind_power", wind_power, 0.0),
            turbulence_power=_number("turbulence_power", turbulence_power, 0.0),
            enable_wind=enable_wind,
            randomize_spawn=randomize_spawn,
            sparse_reward=sparse_reward,
            max_steps=_integer("max_steps", max_steps, 1),
        )
        self.max_steps = self.params.max_steps
        high = np.float32([2.5, 2.5, 10, 10, 2 * math.pi, 10, 1, 1])
        low = np.float32([-2.5, -2.5, -10, -10, -2 * math.pi, -10, 0, 0])
        throttles = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        super().__init__(
            num_envs,
            gym.spaces.Box(low, high),
            throttles if continuous else gym.spaces.Discrete(4),
            render_mode,
            first_env,
        )
        self.start_shapes = {
            "terrain": (num_envs, MOON_CHUNKS + 2),
            "push": (num_envs, 2),
            "position": (num_envs, 2),
            "angle": (num_envs,),
        }
        self.landers = np.zeros(num_envs, LANDER_STATE)
        self.landers["touched"] = -1
        self.landers["feature"] = -1
        self.queue = np.zeros(num_envs, np.int64)  # the order in which environments go into lanes
        self.scratch = np.zeros(1, LANDER_SCRATCH)

    @property
    def state(self):  # a property, because these are views
        return LanderState(*(self.landers[name] for name in LANDER_STATE.names))

    def restart(self, start):
        state = self.state
        _lander_draw_all(self.params, self.landers, self.scratch)
        for env, heights in enumerate(start.get("terrain", ())):
            _lander_terrain(heights.copy(), state.terrain[env])
        if "position" in start:
            state.pose[:, BODY_LANDER, :2] = start["position"]
        if "angle" in start:
            state.pose[:, BODY_LANDER, POSE_ANGLE] = start["angle"]
        if "push" in start:
            state.push[...] = start["push"]
        nothing, outputs = np.zeros((self.num_envs, 2), np.float32), Outputs(**self.buffers)
        _lander_step(nothing, True, self.params, self.landers, self.queue, self.scratch, outputs)

    def observe(self):
        _lander_observe(self.landers, self.scratch, Outputs(**self.buffers))

    def advance(self, actions):
        throttles = actions if self.continuous else THROTTLES.take(actions, axis=0)
        outputs = Outputs(**self.buffers)
        _lander_step(throttles, False, self.params, self.landers, self.queue, self.scratch, outputs)

    def draw(self, env, width=600):
        """What Gymnasium draws: ground, flags, lander and legs; and a flame where an engine fires. 3:2, in pixels."""
        import pygame

        scale = 2 * width / MOON_WIDTH  # drawn at twice the size, then smoothed
        height = 2 * width // 3
        surface = pygame.Surface((2 * width, 2 * height))
        surface.fill("black")

        def polygon(color, corners, edge=0):  # in metres, y up
            points = [(float(scale * x), float(2 * height - scale * y)) for x, y in corners]
            pygame.draw.polygon(surface, color, points, edge)

        ground = [(i * float(MOON_CHUNK_WIDTH), y) for i, y in enumerate(self.state.terrain[env])]
        polygon("white", [(0.0, 0.0), *ground, (MOON_WIDTH, 0.0)])
        for x in (0.4 * MOON_WIDTH, 0.6 * MOON_WIDTH):
            top = MOON_PAD_HEIGHT + 50 / LANDER_PIXELS
            polygon("gray60", [(x, MOON_PAD_HEIGHT), (x, top), (x + 0.05, top), (x + 0.05, MOON_PAD_HEIGHT)])
            flag = [(x, top), (x, top - 10 / LANDER_PIXELS), (x + 25 / LANDER_PIXELS, top - 5 / LANDER_PIXELS)]
            polygon((204, 204, 0), flag)

        def in_world(b, corners):
            x, y, angle = self.state.pose[env, b].tolist()
            cos, sin = math.cos(angle), math.sin(angle)
            return (np.array(corners) - (0.0, BODY_CENTER[b])) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)

        main, lateral = self.state.throttle[env]
        if main > 0.0:
            polygon("orange", in_world(BODY_LANDER, [(-0.2, -0.3), (0.2, -0.3), (0.0, -0.4 - 0.7 * main)]))
        if lateral != 0.0:
            away = math.copysign(1.0, -lateral)  # below 0 it fires on the right side, and pushes to the left
            flame = [(0.5 * away, 0.35), (0.5 * away, 0.5), ((0.6 + 0.4 * abs(lateral)) * away, 0.42)]
            polygon("orange", in_world(BODY_LANDER, flame))
        for b in (BODY_RIGHT_LEG, BODY_LEFT_LEG, BODY_LANDER):
            corners = in_world(b, BODY_CORNERS[b, : BODY_N_CORNERS[b]])
            polygon((128, 102, 230), corners)
            polygon((77, 77, 128), corners, 3)
        surface = pygame.transform.smoothscale(surface, (width, height))
        return pygame.surfarray.array3d(surface).swapaxes(0, 1).copy()


LANDERS = ("LunarLander", "DenseLunarLander", "SparseLunarLander", "LunarLander-v3", "LunarLanderContinuous-v3")


def heuristic_policy(envs):
    """gymnasium.envs.box2d.lunar_lander.heuristic, for a batch of LANDERS: lean towards the pad, fall the slower the
    nearer it is, and once a leg is down only brake the fall.
    """
    discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)

    def act(observations, infos):
        x, y, speed_x, speed_y, angle, spin, right, left = np.moveaxis(observations, -1, 0)  # each (num_envs,)
        down = (right > 0) | (left > 0)
        turn = np.where(down, 0.0, 0.5 * (np.clip(0.5 * x + speed_x, -0.4, 0.4) - angle) - spin)
        climb = np.where(down, 0.0, 0.5 * (0.55 * np.abs(x) - y)) - 0.5 * speed_y
        if not discrete:
            return np.clip(np.stack([20.0 * climb - 1.0, -20.0 * turn], axis=-1), -1.0, 1.0).astype(np.float32)
        side = np.where(turn < -0.05, 3, np.where(turn > 0.05, 1, 0))
        return np.where((climb > np.abs(turn)) & (climb > 0.05), 2, side)

    return act


# ----------------------------------------------------------------------------------------------------------------------
# Native ids
# ----------------------------------------------------------------------------------------------------------------------
NATIVE_ENVS = {
    "Swarm": Swarm,
    "LidarNavigation": LidarNavigation,
    "VmasNavigation": VmasNavigation,
    "LunarLander": LunarLander,
    "DenseLunarLander": partial(LunarLander, randomize_spawn=True),
    "SparseLunarLander": partial(LunarLander, randomize_spawn=True, sparse_reward=True),
}
