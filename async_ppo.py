"""PPO whose actors and learner work at the same time, on any Gymnasium environment with vector observations.

    python async_ppo.py                         train on CartPole-v1
        --env-id LunarLander --eval-env-id LunarLander-v3       train on the fast lander, judged by Gymnasium's own
        --num-actors 0                          the same algorithm, synchronous: collect, learn, collect, ...
        --vtrace                                correct the returns for the lag of the policy that acted
        --rnd-coef 1                            explore, by Random Network Distillation
        --evaluate runs/NAME/model.pt
    torchrun --nproc-per-node 2 async_ppo.py    data-parallel: each process has actors of its own
    tensorboard --logdir runs

Each actor is a process with environments of its own. It takes the newest weights, runs them for num_steps steps,
leaves this fragment in shared memory and goes on with the next. The learner trains on the fragments in the order in
which they come, as many to an update as there are actors, so that a slow one holds up nobody. How it departs from
ppo_swarm.py:

1. One agent to an environment, actions discrete or continuous; rewards may be scaled, observations normalised.
2. A fragment's lag is the number of updates between the policy that acted and the one that starts to learn from it.
   Fragments with more than max_lag are thrown away; an actor whose fragments are all full waits.
3. The probability ratio to the policy that acted has two factors (decoupled PPO, arXiv 2110.00641): that of the
   policy before the update to the one that acted weighs the loss, that of the newest to the one before is clipped.
   V-trace (arXiv 1802.01561) also corrects the returns, with lambda; the ratio already weighs the advantages.
4. With rnd_coef the critic has a second head, for the error with which a network predicts a random one (arXiv
   1810.12894): intrinsic rewards, over their returns' standard deviation, with their own discount and no episodes.
"""

import atexit
import collections
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic CUDA asks for

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import NATIVE_ENVS, compare, evaluate, load, make_vec, open_run, record, save, shared_array

VALIDATION_SEED, TEST_SEED = 2**62, 2**62 + 1  # held out: the seeds of training stay below
CHECK_SECONDS = 0.5  # an actor looks this often whether the learner is still alive
DEATHS, DEATH_SECONDS = 3, 60.0  # so many deaths of actors within so many seconds end the run


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # the name of this experiment
    seed: int = 1  # the seed of everything random
    torch_deterministic: bool = True  # use only deterministic torch operations
    cuda: bool = False  # train on the GPU; small networks are faster on the CPU
    track: bool = False  # also log to Weights and Biases
    wandb_project_name: str = "cleanswarm"  # the project in Weights and Biases
    capture_video: bool = False  # also record a video at the start and at every new best
    evaluate: str | None = None  # do not train, only compare this saved model with the baselines
    init_from: str | None = None  # start from the weights of this saved model, of the same network
    eval_every: int = 20_000  # steps between evaluations
    eval_episodes: int = 100  # held-out episodes in an evaluation
    checkpoint_every: int = 100_000  # steps between checkpoints

    env_id: str = "CartPole-v1"  # any environment with vector observations, of envs.py or of Gymnasium
    # further arguments of the environment, as in: --env-kwargs gravity -9 enable_wind True
    env_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    eval_env_id: str | None = None  # the environment that policies are evaluated in, None is the one they train in
    # further arguments of eval_env_id, as in: --eval-env-kwargs gravity -9
    eval_env_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    num_envs: int = 32  # environments of all actors together, in each process of a torchrun
    num_actors: int = 2  # processes that step them while the learner learns; 0 is the synchronous algorithm
    num_workers: int | None = None  # processes to step them in with 0 actors; 0 is this one, None picks
    max_lag: int = 4  # updates by which a fragment's policy may be behind; with 0 the actors wait for every update

    hidden_dim: int = 64  # width of the layers
    init_logstd: float = -0.5  # log of the standard deviation at the start, before the squashing

    total_timesteps: int = 200_000  # steps to train for
    learning_rate: float = 1e-3  # the step size of Adam
    num_steps: int = 32  # steps of each environment in a fragment
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    reward_scale: float = 1.0  # rewards are multiplied by this: critics learn returns of hundreds slowly
    gamma: float = 0.98  # discount
    gae_lambda: float = 0.9  # lambda of generalised advantage estimation
    vtrace: bool = False  # correct the returns by V-trace
    rnd_coef: float = 0.0  # weight of the intrinsic advantages; 0 is without Random Network Distillation
    rnd_gamma: float = 0.99  # discount of the intrinsic rewards
    norm_obs: bool = False  # the networks see observations normalised by the mean and deviation of all up to then
    num_minibatches: int = 4  # minibatches in an epoch
    update_epochs: int = 10  # epochs over a batch
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # end an update when the approximate KL divergence exceeds this

    def __post_init__(self):
        limits = {
            "num_envs num_steps num_minibatches update_epochs": (1, math.inf),
            "eval_every eval_episodes checkpoint_every": (1, math.inf),
            "num_actors max_lag": (0, math.inf),
            "hidden_dim": (2, math.inf),
            "learning_rate reward_scale clip_coef max_grad_norm target_kl": (1e-12, 1e12),
            "ent_coef vf_coef rnd_coef": (0, 1e12),
            "gamma gae_lambda rnd_gamma": (0, 1),
            "init_logstd": (-20, 5),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ((name, limit) for names, limit in limits.items() for name in names.split()):
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from {low} to {high}")
        if self.num_steps * self.num_envs % self.num_minibatches:
            raise ValueError(f"num_minibatches is {self.num_minibatches}: it must divide num_steps * num_envs")
        if self.num_steps * self.num_envs == self.num_minibatches:  # the advantages of a single step have no deviation
            raise ValueError(f"num_minibatches is {self.num_minibatches}: it must be less than num_steps * num_envs")
        if self.num_envs % max(1, self.num_actors):
            raise ValueError(f"num_actors is {self.num_actors}: it must divide num_envs, {self.num_envs}")
        if self.num_actors and self.num_workers:
            raise ValueError(f"num_workers is {self.num_workers}: only --num-actors 0 has workers, it must be 0")
        if self.eval_env_id is None:
            self.eval_env_id, self.eval_env_kwargs = self.env_id, self.env_kwargs | self.eval_env_kwargs


# -------------------- Network -----------------------------------------------------------------------------------------


def linear(n_in, n_out, std=2**0.5):
    """A layer with orthogonal weights."""
    layer = nn.Linear(n_in, n_out)
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(n_in, hidden, n_out, std):
    return nn.Sequential(linear(n_in, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(), linear(hidden, n_out, std))


class Agent(nn.Module):
    """Actor, critic and, with rnd_coef, what measures novelty; observations are (batch, obs_dim)."""

    def __init__(self, args, envs):
        super().__init__()
        n_in, space = envs.single_observation_space.shape[0], envs.single_action_space
        self.discrete, self.norm_obs = isinstance(space, gym.spaces.Discrete), args.norm_obs
        self.actor = mlp(n_in, args.hidden_dim, space.n if self.discrete else space.shape[0], std=0.01)
        if self.discrete:
            self.first_action = space.start
        else:
            self.actor_logstd = nn.Parameter(torch.full(space.shape, args.init_logstd))
            self.register_buffer("action_low", torch.tensor(space.low), persistent=False)
            self.register_buffer("action_high", torch.tensor(space.high), persistent=False)
        self.critic = mlp(n_in, args.hidden_dim, 2 if args.rnd_coef else 1, std=1.0)
        self.novelty = Novelty(n_in, args.hidden_dim) if args.rnd_coef else None
        self.obs_stats = RunningStats(n_in)
        # Without gradients, but among the weights, and so wherever these go.
        self.obs_mean = nn.Parameter(torch.zeros(n_in), requires_grad=False)
        self.obs_std = nn.Parameter(torch.ones(n_in), requires_grad=False)

    def normalize(self, obs):
        return ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)

    def get_value(self, obs):
        """(..., heads), of the environment's rewards and, with rnd_coef, of the intrinsic ones."""
        return self.critic(self.normalize(obs) if self.norm_obs else obs)

    def get_policy(self, obs):
        features = self.actor(self.normalize(obs) if self.norm_obs else obs)
        if self.discrete:
            return Categorical(features, self.first_action)
        return SquashedNormal(features, self.actor_logstd, self.action_low, self.action_high)

    def make_policy(self, envs):
        """The deterministic policy on arrays, as envs.py evaluates it."""

        @torch.no_grad()
        def act(observations, infos):
            policy = self.get_policy(to_tensor(observations, self.actor[0].weight.device))
            return policy.squash(policy.mode).cpu().numpy()

        return act


class Categorical:
    """Logits (batch, n_actions) as log-probabilities; actions are their indices, (batch,)."""

    def __init__(self, logits, first_action):
        self.logprobs, self.first_action = logits.log_softmax(-1), first_action

    @property
    def mode(self):
        return self.logprobs.argmax(-1)

    def sample(self, generator=None):
        """Draw actions: the argmax of p / E, with E exponentially distributed, is distributed as p (Gumbel's trick)."""
        noise = torch.empty(self.logprobs.shape).exponential_(generator=generator)  # on the CPU, with any device
        return (self.logprobs - noise.log().to(self.logprobs.device)).argmax(-1)

    def squash(self, actions):
        """What the environment calls them: its numbers need not start at 0."""
        return actions + self.first_action

    def log_prob(self, actions):
        return self.logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self):
        return -(self.logprobs.exp() * self.logprobs).sum(-1)


class SquashedNormal:
    """tanh(u), stretched to reach from low to high, with u ~ Normal(mean, exp(logstd)); mean and u (batch, act_dim).

    Actions are kept as u, so that tanh never has to be inverted; log_prob and entropy are those of the squashed action.
    """

    def __init__(self, mean, logstd, low, high):
        self.mean = self.mode = mean
        self.logstd, self.low, self.high = logstd, low, high
        self.scale, self.bias = (high - low) / 2, (high + low) / 2

    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean.device)  # on the CPU, with any device
        return self.mean + self.logstd.exp() * noise

    def squash(self, u):
        return torch.clamp(self.scale * torch.tanh(u) + self.bias, self.low, self.high)  # rounding may lead beyond

    def log_prob(self, u):
        z = (u - self.mean) * torch.exp(-self.logstd)
        return (-0.5 * z**2 - self.logstd - 0.5 * math.log(2 * math.pi) - self.log_slope(u)).sum(-1)

    def entropy(self):
        """The Normal's, and the mean of log_slope: that has no closed form, one reparameterised sample estimates it."""
        return (0.5 * math.log(2 * math.pi * math.e) + self.logstd + self.log_slope(self.sample())).sum(-1)

    def log_slope(self, u):
        """log of d action / d u, with log(1 - tanh(u)^2) as 2 (log 2 - u - softplus(-2 u)): keeps its digits."""
        return 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.scale.log()


class Novelty(nn.Module):
    """Random Network Distillation: one network learns to predict another, a random one, where it has been."""

    def __init__(self, n_in, hidden):
        super().__init__()
        self.target = mlp(n_in, hidden, hidden, std=2**0.5).requires_grad_(False)
        self.predictor = mlp(n_in, hidden, hidden, std=2**0.5)
        self.return_stats = RunningStats(1)

    def forward(self, obs, obs_stats):
        """(..., obs_dim) to the squared error (...,)."""
        x = ((obs - obs_stats.mean.float()) / obs_stats.std()).clamp(-5, 5)
        return ((self.predictor(x) - self.target(x)) ** 2).mean(-1)


class RunningStats(nn.Module):
    """Mean and variance of all rows seen, merged batch by batch (Chan, Golub and LeVeque 1979)."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x, world_size):
        """x is (rows, size), in every process of a torchrun."""
        mean, square = average(torch.stack([x.double().mean(0), (x.double() ** 2).mean(0)]), world_size)
        share = len(x) * world_size / (self.count + len(x) * world_size)  # of these among all rows
        delta = mean - self.mean
        self.var += share * (square - mean**2 - self.var) + share * (1 - share) * delta**2
        self.mean += share * delta
        self.count += len(x) * world_size

    def std(self):
        return self.var.clamp(min=1e-8).sqrt().float()


def to_tensor(observations, device):
    return torch.as_tensor(observations, dtype=torch.float32, device=device)


# -------------------- Algorithm ---------------------------------------------------------------------------------------


def compute_gae(rewards, values, last_value, final_values, dones, rhos, gamma, gae_lambda):
    """Advantages and returns, the targets of the values: both (num_steps, num_envs, heads).

    So are rewards, values, final_values and dones; last_value is (num_envs, heads), rhos are (num_steps, num_envs, 1).
    Where dones is 1 an episode ended: the value of what came next is then not that of the next step, which belongs to
    another episode, but final_values: V(final_obs) if a time limit cut the episode off, 0 if it terminated. rhos are
    the probability ratios of the policy before the update to the one that acted, cut at 1: V-trace's rho and, times
    lambda, its c (arXiv 1802.01561, section 4.1). Where they are 1, as without a lag, this is GAE. gamma is (heads,).
    """
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    correction, next_value = 0, last_value  # correction: by how much the return of the next step differs from its value
    for t in reversed(range(len(rewards))):
        next_value = (1 - dones[t]) * next_value + dones[t] * final_values[t]
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * gae_lambda * (1 - dones[t]) * correction
        correction = rhos[t] * advantages[t]
        returns[t] = values[t] + correction
        next_value = values[t]
    return advantages, returns


def intrinsic_rewards(agent, next_obs, sums, owners, gamma, world_size):
    """(num_steps, num_envs): how novel next_obs is, over the standard deviation of the discounted sums of that.

    sums (num_actors, num_envs / num_actors) holds each environment's sum up to now; owners are the batch's actors.
    """
    with torch.no_grad():
        rewards = agent.novelty(next_obs, agent.obs_stats)
    returns = torch.empty_like(rewards)
    pieces = zip(owners, rewards.chunk(len(owners), dim=1), returns.chunk(len(owners), dim=1), strict=True)
    for actor, reward, running in pieces:  # one by one: an actor that is fast may own several, one after the other
        for t in range(len(reward)):
            running[t] = sums[actor] = gamma * sums[actor] + reward[t]
    agent.novelty.return_stats.update(returns.view(-1, 1), world_size)
    return rewards / agent.novelty.return_stats.std()


def approx_kl(logratio):
    """KL(old || new), estimated from actions of the old policy, if none lags: http://joschu.net/blog/kl-approx.html."""
    return (logratio.exp() - 1 - logratio).mean()


# -------------------- Actors ------------------------------------------------------------------------------------------


def make_fragment(envs, num_steps):
    """Arrays in shared memory for num_steps steps of `envs`."""
    num_envs, shape = envs.num_envs, envs.single_observation_space.shape
    discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
    sizes = {
        "obs": ((num_steps + 1, num_envs, *shape), np.float32),  # the last ones are what the next fragment starts with
        "final_obs": ((num_steps, num_envs, *shape), np.float32),  # valid where an episode ended
        "actions": ((num_steps, num_envs, *envs.single_action_space.shape), np.int64 if discrete else np.float32),
        "logprobs": ((num_steps, num_envs), np.float32),
        "rewards": ((num_steps, num_envs), np.float32),
        "terminations": ((num_steps, num_envs), bool),
        "truncations": ((num_steps, num_envs), bool),
        "stats": ((num_steps, num_envs, len(envs.stat_names)), np.float64),  # of the episodes that ended
    }
    return {name: shared_array(shape, dtype) for name, (shape, dtype) in sizes.items()}


@torch.no_grad()
def collect(agent, envs, observations, generator, fragment):
    """Fill the fragment, starting from `observations`; returns those that come next."""
    device = agent.actor[0].weight.device
    for step in range(len(fragment["rewards"])):
        fragment["obs"][step] = observations
        policy = agent.get_policy(to_tensor(observations, device))
        actions = policy.sample(generator)
        fragment["actions"][step] = actions.cpu().numpy()
        fragment["logprobs"][step] = policy.log_prob(actions).cpu().numpy()
        observations, rewards, terminations, truncations, infos = envs.step(policy.squash(actions).cpu().numpy())
        fragment["rewards"][step] = rewards
        fragment["terminations"][step], fragment["truncations"][step] = terminations, truncations
        if "episode" in infos:
            fragment["final_obs"][step] = infos["final_obs"]
            fragment["stats"][step] = np.stack([*infos["episode"].values()], axis=-1)
    fragment["obs"][-1] = observations
    return observations


def make_seed(*keys):
    """One seed below the held-out ones from several non-negative integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(2))


def leave_with(learner):
    """End this process when the learner is gone, be it in the middle of a fragment; in a thread of its own."""
    while os.getppid() == learner:
        time.sleep(CHECK_SECONDS)
    os._exit(1)


def act(args, seed, learner, channel, learners_ends, fragments, weights, version):
    """An actor: for every slot that comes through the channel, fill that fragment and send back (slot, version)."""
    torch.set_num_threads(1)  # first: torch's threads did not survive the fork, and it waits for them (pytorch#17199)
    threading.Thread(target=leave_with, args=(learner,), daemon=True).start()
    # They go to all processes of a job, but the learner decides; SIG_IGN would stay with what an environment starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    for end in learners_ends:
        end.close()  # each channel has to break when the learner is gone
    try:
        envs = make_vec(args.env_id, args.num_envs // args.num_actors, num_workers=0, **args.env_kwargs)
        with contextlib.closing(envs):
            agent, generator = Agent(args, envs), torch.Generator().manual_seed(seed)
            mine = torch.empty_like(weights[0])
            nn.utils.vector_to_parameters(mine, agent.parameters())  # makes them views
            observations, _ = envs.reset(seed=seed)
            while True:
                slot = channel.recv()
                current = -1
                while current != version.item():  # the learner writes into the other half, unless an update ahead
                    current = version.item()
                    mine.copy_(weights[current % 2])
                observations = collect(agent, envs, observations, generator, fragments[slot])
                channel.send((slot, current))
    except BaseException:  # an EOFError, too: the learner has closed its end of the pipe
        with contextlib.suppress(ConnectionError):  # nobody is left to hear of it
            channel.send(traceback.format_exc())


class Actors:
    """The actor processes. Each owns two fragments, one to fill while the other waits, or one if no lag is allowed.

    A process each and no Pool: what is forked in the place of a dead one is then forked by the learner between two
    updates, and not by a thread of the Pool's in the middle of one.
    """

    def __init__(self, args, envs, weights, version, seeds):
        slots = range(1 if args.max_lag == 0 else 2)
        self.args, self.seeds, self.starts = args, seeds, 0
        self.weights = torch.from_numpy(shared_array((2, len(weights)), np.float32))  # of even and odd versions
        self.version = torch.from_numpy(shared_array((1,), np.int64))  # the number of the update that made them
        self.fragments = [[make_fragment(envs, args.num_steps) for _ in slots] for _ in range(args.num_actors)]
        self.arrived, self.taken = collections.deque(), []  # (actor, slot, version)
        self.processes, self.channels = {}, {}  # by actor
        self.deaths, self.discarded = [], 0
        atexit.register(self.close)
        self.publish(weights, version)
        for actor in range(args.num_actors):
            self.start(actor)

    def start(self, actor):
        self.channels[actor], channel = multiprocessing.Pipe()
        seed, channels = make_seed(*self.seeds, actor, self.starts), [*self.channels.values()]
        arguments = (self.args, seed, os.getpid(), channel, channels, self.fragments[actor], self.weights, self.version)
        self.processes[actor] = multiprocessing.get_context("fork").Process(target=act, args=arguments, daemon=True)
        self.processes[actor].start()
        self.starts += 1
        channel.close()
        held = {slot for owner, slot, _ in (*self.arrived, *self.taken) if owner == actor}
        for slot in set(range(len(self.fragments[actor]))) - held:
            self.give(actor, slot)

    def publish(self, weights, version):
        self.weights[version % 2] = weights
        self.version[0] = version  # if seen before the weights, as ARM may, an actor runs some old ones unawares

    def take(self, count):
        """(actor, fragment, lag) of the `count` that came first; they stay as they are until `release`."""
        self.taken, newest = [], self.version.item()
        while len(self.taken) < count:
            if self.arrived:
                actor, slot, version = self.arrived.popleft()
                if newest - version <= self.args.max_lag:
                    self.taken.append((actor, slot, version))
                else:
                    self.discarded += 1
                    self.give(actor, slot)
                continue
            ready = multiprocessing.connection.wait(self.channels.values())
            for actor in [actor for actor, channel in self.channels.items() if channel in ready]:
                try:
                    message = self.channels[actor].recv()
                except (EOFError, ConnectionError):
                    self.replace(actor)
                    continue
                if isinstance(message, str):
                    raise RuntimeError(f"an actor failed:\n{message}")
                self.arrived.append((actor, *message))
        return [(actor, self.fragments[actor][slot], newest - version) for actor, slot, version in self.taken]

    def replace(self, actor):
        process = self.processes[actor]
        process.join()
        died = f"actor process {process.pid} died, with exit code {process.exitcode}"
        self.deaths = [*(at for at in self.deaths if time.time() - at < DEATH_SECONDS), time.time()]
        if len(self.deaths) >= DEATHS:
            raise RuntimeError(f"{died}: the last of {DEATHS} within {DEATH_SECONDS:.0f} seconds")
        tqdm.write(f"{died}: its fragment is lost, another takes its place")
        self.channels[actor].close()
        self.start(actor)

    def give(self, actor, slot):
        with contextlib.suppress(ConnectionError):  # it died: whoever takes its place is given all free slots
            self.channels[actor].send(slot)

    def release(self):
        taken, self.taken = self.taken, []
        for actor, slot, _ in taken:
            self.give(actor, slot)

    def close(self):
        for channel in self.channels.values():
            channel.close()
        deadline = time.time() + 3 * CHECK_SECONDS
        for process in self.processes.values():
            process.join(max(0.0, deadline - time.time()))
            process.kill()


# -------------------- Run ---------------------------------------------------------------------------------------------


def average(tensor, world_size):
    """The mean over the processes of a torchrun, in place."""
    if world_size > 1:
        dist.all_reduce(tensor)
        tensor /= world_size
    return tensor


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.replace("\n", "\n "))
    if args.evaluate:  # the saved arguments are the defaults: the same network and world but for what is given
        defaults = load(args.evaluate)["args"]
        default = Args(**defaults | {"env_kwargs": {}, "eval_env_kwargs": {}, "init_from": None, "cuda": args.cuda})
        args = tyro.cli(Args, default=default)
        if (args.env_id, args.env_kwargs) != (defaults["env_id"], {}):
            given = f"env_id is {args.env_id!r}, env_kwargs is {args.env_kwargs}"
            raise ValueError(f"{given}: with evaluate they must be left out; eval_env_id and eval_env_kwargs choose")
        args.env_kwargs = defaults["env_kwargs"]
        if args.eval_env_id == defaults["eval_env_id"]:
            args.eval_env_kwargs = defaults["eval_env_kwargs"] | args.eval_env_kwargs
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    torch.set_deterministic_debug_mode("error" if args.torch_deterministic else "default")

    # Environments first: workers have to be forked before torch starts threads. With actors, these show only the spaces
    num_workers = 0 if args.num_actors else args.num_workers
    envs = make_vec(args.env_id, args.num_envs // max(1, args.num_actors), num_workers, **args.env_kwargs)
    env_id, env_kwargs = args.eval_env_id, args.eval_env_kwargs  # that policies are evaluated in
    eval_envs = make_vec(env_id, 1, num_workers=0, **env_kwargs)
    for name, world in (("env_id", envs), ("eval_env_id", eval_envs)):
        observes, acts = world.single_observation_space, world.single_action_space
        real = len(acts.shape) == 1 and acts.dtype.kind == "f" and acts.is_bounded()
        if len(observes.shape) != 1 or not (isinstance(acts, gym.spaces.Discrete) or real):
            allowed = "an environment of one agent, with vector observations and discrete or bounded real actions"
            raise ValueError(f"{name} is {getattr(args, name)!r}: it must be {allowed}, not {observes} and {acts}")
        if (observes.shape, acts) != (envs.single_observation_space.shape, envs.single_action_space):
            raise ValueError(f"{name} is {getattr(args, name)!r}: it must observe and act as {args.env_id} does")
    eval_envs.close()
    if args.cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group("nccl" if args.cuda else "gloo")

    torch.manual_seed(args.seed)
    agent = Agent(args, envs).to(device)
    policies = {args.exp_name: agent.make_policy}
    # One vector holds all weights, and one their gradients: clipping, averaging and Adam are then one operation each.
    parameters = list(agent.parameters())
    weights = nn.utils.parameters_to_vector(parameters).detach()
    weights.grad = torch.zeros_like(weights)
    nn.utils.vector_to_parameters(weights, parameters)  # makes them views
    for parameter, grad in zip(parameters, weights.grad.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    if args.init_from:
        agent.load_state_dict(load(args.init_from)["model"])
    if args.evaluate:
        agent.load_state_dict(load(args.evaluate)["model"])
        folder = Path(args.evaluate).parent / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder.mkdir()
        print(compare(policies, env_id, args.eval_episodes, TEST_SEED, folder, **env_kwargs)[1])
        print(f"In {folder}: {', '.join(sorted(os.listdir(folder)))}")
        raise SystemExit

    steps_per_iteration = args.num_steps * args.num_envs * world_size
    num_iterations = args.total_timesteps // steps_per_iteration
    if num_iterations < 1:
        raise ValueError(f"total_timesteps is {args.total_timesteps}: one rollout already has {steps_per_iteration}")

    # The run's folder, a new one or an unfinished run's
    run = [*open_run(asdict(args), world_size)] if rank == 0 else [None, None]
    if world_size > 1:
        dist.broadcast_object_list(run)
    run_dir, checkpoint = run
    iteration, best_score = 0, -math.inf
    # The ranks begin with the same weights and go on with draws of their own; torch reads only 32 bits of a seed.
    torch.manual_seed((args.seed + rank * 0x9E3779B9) % 2**32)
    novelty_sums = torch.zeros(max(1, args.num_actors), envs.num_envs, device=device)  # of each actor's environments
    if checkpoint:
        iteration, best_score, mine = checkpoint["iteration"], checkpoint["best_score"], checkpoint["ranks"][rank]
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(mine["rng"])
        novelty_sums[...] = mine["novelty_sums"]
        if rank == 0 and not mine["envs"] and (run_dir / "model.pt").exists():
            best_score = max(best_score, load(run_dir / "model.pt")["score"])  # it may be newer, of another course
    global_step = first_step = iteration * steps_per_iteration
    if args.num_actors:
        torch.set_num_threads(max(1, torch.get_num_threads() - args.num_actors))
        envs.reset(seed=0)
        envs.step(envs.action_space.sample())  # kernels are compiled or loaded once, here, and not in every actor
        actors = Actors(args, envs, weights, iteration, (args.seed, rank, first_step))
    else:  # what an actor has, in this process
        seed = make_seed(args.seed, rank, first_step, 0, 0)
        generator, fragment = torch.Generator().manual_seed(seed), make_fragment(envs, args.num_steps)
        observations, _ = envs.reset(seed=seed)
        if checkpoint and mine["envs"]:
            generator.set_state(mine["generator"])
            observations, _ = envs.set_state({name: array.numpy() for name, array in mine["envs"].items()})
    if rank == 0:
        if args.track:
            import wandb

            run_id = dict(id=run_dir.name, name=run_dir.name, resume="allow")
            wandb.init(project=args.wandb_project_name, config=asdict(args), sync_tensorboard=True, **run_id)
        writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # drops what was logged after the checkpoint
        if not checkpoint:
            rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(args).items())
            writer.add_text("args", f"| argument | value |\n|---|---|\n{rows}")
        print(f"{'resumed at' if checkpoint else 'new,'} {global_step:,} of {args.total_timesteps:,}: {run_dir}")
        if args.capture_video and not checkpoint:
            record(agent.make_policy, env_id, VALIDATION_SEED, run_dir / "0.mp4", **env_kwargs)
    stop = []  # the first SIGINT or SIGTERM ends the run after the iteration, the next of its kind at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stop.append(number), signal.signal(number, signal.SIG_DFL)))

    heads = 2 if args.rnd_coef else 1
    gammas = torch.tensor([args.gamma, args.rnd_gamma][:heads], device=device)
    coefs = torch.tensor([1.0, args.rnd_coef][:heads], device=device)
    stopping, finished, start_time = False, iteration == num_iterations, time.time()
    progress = tqdm(total=num_iterations * steps_per_iteration, initial=global_step, unit_scale=True, disable=rank > 0)
    while not finished and not stopping:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        iteration += 1

        # Rollout
        rollout_start = time.time()
        if args.num_actors:
            try:
                owners, fragments, lags = zip(*actors.take(args.num_actors), strict=True)
            except RuntimeError:
                if checkpoint and rank == 0:
                    writer.flush()  # as below
                    save(checkpoint, run_dir / "checkpoint.pt")
                raise
        else:
            observations = collect(agent, envs, observations, generator, fragment)
            owners, fragments, lags = (0,), (fragment,), (0,)
        update_start = time.time()
        obs, final_obs, actions, logprobs, rewards, terminations, truncations, stats = (
            torch.cat([torch.from_numpy(part[name]) for part in fragments], dim=1).to(device)
            for name in ("obs", "final_obs", "actions", "logprobs", "rewards", "terminations", "truncations", "stats")
        )  # (num_steps, num_envs, ...), obs one step more
        done = terminations | truncations
        rewards, dones = args.reward_scale * rewards.unsqueeze(-1), done.float().unsqueeze(-1)  # (..., heads)
        if args.rnd_coef or args.norm_obs:
            next_obs = torch.where(done.unsqueeze(-1), final_obs, obs[1:])
            agent.obs_stats.update(next_obs.flatten(0, 1), world_size)
        if args.rnd_coef:
            novelty = intrinsic_rewards(agent, next_obs, novelty_sums, owners, args.rnd_gamma, world_size)
            b_next_obs, rewards = next_obs.flatten(0, 1), torch.cat([rewards, novelty.unsqueeze(-1)], dim=-1)
            dones = torch.cat([dones, torch.zeros_like(dones)], dim=-1)  # as in the paper, across episodes
        cut_off = truncations & ~terminations
        final_values = torch.zeros_like(rewards)
        with torch.no_grad():
            values = agent.get_value(obs)
            final_values[cut_off] = agent.get_value(final_obs[cut_off])
            old_logprobs = agent.get_policy(obs[:-1]).log_prob(actions) if any(lags) else logprobs  # before the update
            lag_ratios = (old_logprobs - logprobs).exp()  # to the policy that acted, 1 without a lag
            rhos = (lag_ratios.clamp(max=1) if args.vtrace else torch.ones_like(lag_ratios)).unsqueeze(-1)
        values, last_value = values[:-1], values[-1]
        advantages, returns = compute_gae(
            rewards, values, last_value, final_values, dones, rhos, gammas, args.gae_lambda
        )
        advantages = (advantages * coefs).sum(-1)

        # Update
        b_obs, b_actions, b_logprobs, b_lag_ratios, b_advantages, b_returns, b_values = (
            x.flatten(0, 1) for x in (obs[:-1], actions, old_logprobs, lag_ratios, advantages, returns, values)
        )
        minibatches = (
            mb_inds
            for _ in range(args.update_epochs)
            for mb_inds in torch.randperm(len(b_obs)).to(device).chunk(args.num_minibatches)
        )
        losses, logratios = [], []  # of every minibatch
        for mb_inds in minibatches:
            # index_select copies whole rows, and is several times faster than b_obs[mb_inds]
            mb_obs = b_obs.index_select(0, mb_inds)
            policy, newvalue = agent.get_policy(mb_obs), agent.get_value(mb_obs)
            logratio = policy.log_prob(b_actions[mb_inds]) - b_logprobs[mb_inds]
            ratio = logratio.exp()  # (minibatch,)
            mb_advantages = b_advantages[mb_inds]
            if args.norm_adv:
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = (b_lag_ratios[mb_inds] * torch.max(pg_loss1, pg_loss2)).mean()

            v_loss = (newvalue - b_returns[mb_inds]) ** 2
            if args.clip_vloss:
                v_clipped = b_values[mb_inds] + (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                v_loss = torch.max(v_loss, (v_clipped - b_returns[mb_inds]) ** 2)
            v_loss = 0.5 * v_loss.mean()

            with torch.set_grad_enabled(args.ent_coef > 0):  # at 0 it is only logged, and its gradient a waste of time
                entropy = policy.entropy().mean()
            loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
            if args.rnd_coef and len(losses) < args.num_minibatches:  # once a batch, or soon nothing is novel
                loss = loss + agent.novelty(b_next_obs.index_select(0, mb_inds), agent.obs_stats).mean()

            losses.append(torch.stack([v_loss, pg_loss, entropy]).detach())
            logratios.append(logratio.detach())
            if args.target_kl is not None and average(approx_kl(logratios[-1]), world_size) > args.target_kl:
                break
            weights.grad.zero_()
            loss.backward()
            average(weights.grad, world_size)
            nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
        if args.norm_obs:
            agent.obs_mean.copy_(agent.obs_stats.mean)
            agent.obs_std.copy_(agent.obs_stats.std())
        if args.num_actors:
            actors.publish(weights, iteration)
            actors.release()

        # Log
        last_step, global_step, now = global_step, global_step + steps_per_iteration, time.time()
        episodes = dict(zip(envs.stat_names, stats[done].T.cpu().numpy(), strict=True)) if done.any() else {}
        if rank == 0:
            loss_names, losses = ("value_loss", "policy_loss", "entropy"), torch.stack(losses).mean(0)
            scalars = {f"losses/{name}": loss for name, loss in zip(loss_names, losses, strict=True)}
            logratio = torch.stack(logratios)
            scalars["losses/old_approx_kl"] = (-logratio).mean()
            scalars["losses/approx_kl"] = approx_kl(logratio)
            scalars["losses/clipfrac"] = ((logratio.exp() - 1).abs() > args.clip_coef).float().mean()
            scalars["losses/explained_variance"] = 1 - (returns - values)[..., 0].var() / returns[..., 0].var()
            if not agent.discrete:
                scalars["losses/std"] = agent.actor_logstd.detach().exp().mean()
            if args.rnd_coef:
                scalars["losses/novelty"] = novelty.mean()
            scalars["charts/lag_mean"], scalars["charts/lag_max"] = np.mean(lags), max(lags)
            scalars["charts/discarded"] = actors.discarded if args.num_actors else 0  # fragments, up to now
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/SPS"] = (global_step - first_step) / (now - start_time)  # all costs included
            scalars["charts/rollout_seconds"] = update_start - rollout_start  # of an asynchronous learner: idle
            scalars["charts/update_seconds"] = now - update_start
            scalars["charts/idle"] = (update_start - rollout_start) / (now - rollout_start)
            for name, value in episodes.items():
                tag = {"r": "charts/episodic_return", "l": "charts/episodic_length"}.get(name, f"episode/{name}")
                scalars[tag] = np.mean(value)
            for tag, value in scalars.items():
                writer.add_scalar(tag, float(value), global_step)
            progress.update(steps_per_iteration)
            if episodes:
                postfix = f"SPS {scalars['charts/SPS']:,.0f}, return {np.mean(episodes['r']):.2f}"
                progress.set_postfix_str(postfix, refresh=False)

        # Evaluate
        finished = iteration == num_iterations
        if rank == 0 and (global_step // args.eval_every > last_step // args.eval_every or finished):
            stats, _, _ = evaluate(agent.make_policy, env_id, args.eval_episodes, VALIDATION_SEED, **env_kwargs)
            for name, value in stats.items():
                writer.add_scalar(f"eval/{name}", value.mean(), global_step)
            score, best = float(stats["r"].mean()), ""
            content = {"args": asdict(args), "model": agent.state_dict(), "score": score}
            if score > best_score and save(content, run_dir / "model.pt"):
                best_score, best = score, ", the best so far"
            if best and args.capture_video:
                record(agent.make_policy, env_id, VALIDATION_SEED, run_dir / f"{global_step}.mp4", **env_kwargs)
            tqdm.write(f"step {global_step:,}: held-out return {score:.2f}, length {stats['l'].mean():.0f}{best}")

        # Checkpoint: with actors put together after every iteration, because their deaths may end the run in the next
        stopping = average(torch.tensor(float(len(stop)), device=device), world_size) > 0  # on all ranks or none
        due = global_step // args.checkpoint_every > last_step // args.checkpoint_every or finished or stopping
        if args.num_actors or due:
            mine = {"rng": torch.get_rng_state(), "novelty_sums": novelty_sums.cpu(), "envs": {}}
            if not args.num_actors:
                mine["generator"] = generator.get_state()
                if args.env_id in NATIVE_ENVS:
                    mine["envs"] = {name: torch.from_numpy(array) for name, array in envs.get_state().items()}
            ranks = [mine] * world_size
            if world_size > 1:
                dist.all_gather_object(ranks, mine)
            checkpoint = {"args": asdict(args), "iteration": iteration, "best_score": best_score, "ranks": ranks}
            checkpoint |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
        if rank == 0 and due:
            writer.flush()  # first, so that the curves reach at least as far as the checkpoint
            save(checkpoint, run_dir / "checkpoint.pt")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # all is saved: what is left can be done again
    envs.close()
    if args.num_actors:
        actors.close()
    progress.close()
    if rank == 0 and not finished:
        print(f"stopped at {global_step:,} of {args.total_timesteps:,}; the same command goes on from there: {run_dir}")
    elif rank == 0:
        agent.load_state_dict(load(run_dir / "model.pt")["model"])
        scores, table = compare(policies, env_id, args.eval_episodes, TEST_SEED, run_dir, **env_kwargs)
        print(f"\nThe best policy on {args.eval_episodes} other held-out episodes:\n\n{table}\n")
        for name, score in scores.items():
            writer.add_scalar(f"test/{name}", score, global_step)
        writer.close()
        (run_dir / "checkpoint.pt").unlink(missing_ok=True)
        files = ", ".join(sorted(os.listdir(run_dir)))
        print(f"{(time.time() - start_time) / 60:.1f} minutes. In {run_dir}: {files}")
    if world_size > 1:
        dist.barrier()  # torchrun ends all if one fails, even on its way out: rank 0 has to have written its files
        dist.destroy_process_group()
