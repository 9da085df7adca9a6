"""PPO whose actors and learner work at the same time, on any Gymnasium environment with vector observations.

    python async_ppo.py                         train on CartPole-v1
        --env-id LunarLander --eval-env-id LunarLander-v3 ...   the fast lander: docs/async.md has its flags
        --num-actors 0                          the same algorithm, synchronous: collect, learn, collect, ...
        --vtrace                                correct the returns for the lag of the policy that acted
        --lasting-noise 1                       explore with noise that lasts, where momentum has to be built up
        --rnd-coef 1 --no-norm-adv              explore, by Random Network Distillation
        --evaluate runs/NAME/model.pt
    torchrun --nproc-per-node 2 SCRIPT          data-parallel: each process has actors of its own
    tensorboard --logdir runs

Each actor is a process with environments of its own. It takes the newest weights, runs them for num_steps steps,
leaves these, a fragment, in shared memory and goes on. The learner trains on fragments as they come, as many to an
update as there are actors, so that a slow one holds up nobody. How it departs from ppo_swarm.py:

1. One agent to an environment, actions discrete or continuous; rewards and observations may be normalised, and noise
   may last.
2. A fragment's lag is the number of updates between the policy that acted and the one that starts to learn from it.
   Fragments with more than max_lag are thrown away; an actor whose fragments are all full waits.
3. Three policies count (decoupled PPO, arXiv 2110.00641): the one that acted, the one before the update, the newest.
   The ratio of the second to the first weighs the loss; that of the newest to the second is clipped. With vtrace
   (arXiv 1802.01561, with lambda) the first of these ratios, cut off at 1, also corrects the returns.
4. With rnd_coef the critic has a second head, for intrinsic rewards: the error in predicting a random network (arXiv
   1810.12894), over their returns' standard deviation. They have a discount of their own, and no episode ends them.
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs import (
    Run,
    StreamPool,
    average,
    check_args,
    evaluate_model,
    flatten,
    load,
    make_all,
    make_fragment,
    parse_args,
    setup,
)


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # the name of this experiment
    seed: int = 1  # the seed of everything random
    torch_deterministic: bool = True  # use only deterministic torch operations
    compile: bool = False  # compile the loss with torch.compile: faster updates, after half a minute
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
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # its arguments, as in: gravity -9
    train_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # in training only; 9,5: stages
    stage_returns: str | None = None  # eval/r that ends each stage but the last, as in 5,12; None: equal shares
    eval_env_id: str | None = None  # the environment that policies are evaluated in, None is the one they train in
    eval_env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # likewise, of eval_env_id
    num_envs: int = 32  # environments of all actors together, in each process of a torchrun
    num_actors: int = 2  # processes that step them while the learner learns; 0 is the synchronous algorithm
    num_workers: int | None = None  # processes to step them in with 0 actors; 0 is this one, None picks
    max_lag: int = 4  # updates by which a fragment's policy may be behind; with 0 the actors wait for every update

    hidden_dim: int = 64  # width of the layers
    init_logstd: float = -0.5  # log of the standard deviation at the start, before the squashing
    lasting_noise: float = 0.0  # share of the environments whose noise lasts for some ten steps; falls linearly to 0

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
    norm_reward: bool = False  # divide rewards by the deviation of their discounted sums; undoes reward_scale
    norm_obs: bool = False  # the networks see observations normalised by the mean and deviation of all so far
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
        check_args(self, rows=self.num_steps * self.num_envs)
        if self.num_envs % max(1, self.num_actors):
            raise ValueError(f"num_actors is {self.num_actors}: it must divide num_envs, {self.num_envs}")
        if self.num_actors and self.num_workers:
            raise ValueError(f"num_workers is {self.num_workers}: only --num-actors 0 has workers, it must be 0")
        if self.eval_env_id is None:
            self.eval_env_id = self.env_id
            self.eval_env_kwargs = self.env_kwargs | self.eval_env_kwargs


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
        n_in = envs.single_observation_space.shape[0]
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        self.lasting_noise = 0.0 if self.discrete else args.lasting_noise
        self.norm_obs = args.norm_obs
        self.actor = mlp(n_in, args.hidden_dim, space.n if self.discrete else space.shape[0], std=0.01)
        if self.discrete:
            self.first_action = space.start
        else:
            self.actor_logstd = nn.Parameter(torch.full(space.shape, args.init_logstd))
            self.register_buffer("action_low", torch.tensor(space.low), persistent=False)
            self.register_buffer("action_high", torch.tensor(space.high), persistent=False)
        heads = 2 if args.rnd_coef else 1
        self.critic = mlp(n_in, args.hidden_dim, heads, std=1.0)
        self.novelty = Novelty(n_in, args.hidden_dim) if args.rnd_coef else None
        self.return_stats = RunningStats(heads) if args.rnd_coef or args.norm_reward else None
        self.obs_stats = RunningStats(n_in)
        # Parameters, though without gradients, so that they are in the vector of weights that actors read
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

    def make_policy(self, envs, greedy=True):
        """The policy on arrays, as envs.py evaluates it: the mode of its actions, or drawn as in training."""
        generator = torch.Generator().manual_seed(0)

        @torch.no_grad()
        def act(observations, infos):
            policy = self.get_policy(to_tensor(observations, self.actor[0].weight.device))
            return policy.squash(policy.mode if greedy else policy.sample(generator)).cpu().numpy()

        return act


class Categorical:
    """Logits (batch, n_actions) as log-probabilities; actions are their indices, (batch,)."""

    def __init__(self, logits, first_action):
        self.logprobs = logits.log_softmax(-1)
        self.first_action = first_action

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
    """tanh(u), stretched to reach from low to high, with u ~ Normal(mean, exp(logstd)); mean and u are (..., act_dim).

    Actions are kept as u, so that tanh never has to be inverted; log_prob and entropy are those of the squashed action.
    """

    def __init__(self, mean, logstd, low, high):
        self.mean = self.mode = mean
        self.logstd = logstd
        self.low = low
        self.high = high

    def sample(self, generator=None):
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean.device)  # on the CPU, with any device
        return self.mean + self.logstd.exp() * noise

    def squash(self, u):
        return torch.lerp(self.low, self.high, torch.sigmoid(2 * u))  # (tanh(u) + 1) / 2 of the way, and never beyond

    def log_prob(self, u):
        z = (u - self.mean) * torch.exp(-self.logstd)
        return (-0.5 * z**2 - self.logstd - 0.5 * math.log(2 * math.pi) - self.log_det_jacobian(u)).sum(-1)

    def entropy(self):
        """The Normal's plus the mean of log_det_jacobian, which one reparameterised sample estimates."""
        log_det = self.log_det_jacobian(self.sample())
        return (0.5 * math.log(2 * math.pi * math.e) + self.logstd + log_det).sum(-1)

    def log_det_jacobian(self, u):
        """log(d action / d u) = log((high - low) / 2) + log(1 - tanh(u)^2), in a form that keeps its digits."""
        return torch.log(2 * (self.high - self.low)) - 2 * (u + F.softplus(-2 * u))


class Novelty(nn.Module):
    """Random Network Distillation: one network learns to predict another, a random one, where it has been."""

    def __init__(self, n_in, hidden):
        super().__init__()
        self.target = mlp(n_in, hidden, hidden, std=2**0.5).requires_grad_(False)
        self.predictor = mlp(n_in, hidden, hidden, std=2**0.5)

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
        mean, square = average(torch.stack([x.double().mean(0), (x.double() ** 2).mean(0)]))
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


def compute_gae(rewards, values, last_value, final_values, dones, rho, gamma, gae_lambda):
    """Advantages and returns (num_steps, num_envs, heads); so are rewards, values, final_values, dones; gamma (heads,).

    Where dones is 1 an episode ended, and what came next was worth final_values: V(final_obs) if a time limit cut it
    off, 0 if it terminated. The next step belongs to another episode, and nothing of it counts here. rho (num_steps,
    num_envs, 1) is the probability ratio of the policy before the update to the one that acted, cut at 1: V-trace's
    rho and, times lambda, its c (arXiv 1802.01561, section 4.1). Where it is 1, as without a lag, this is GAE.
    """
    advantages = torch.zeros_like(rewards)
    returns = torch.zeros_like(rewards)  # what the values are to become
    correction = 0  # by how much the return of the next step differs from its value
    next_value = last_value
    for t in reversed(range(len(rewards))):
        next_value = (1 - dones[t]) * next_value + dones[t] * final_values[t]
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * gae_lambda * (1 - dones[t]) * correction
        correction = rho[t] * advantages[t]
        returns[t] = values[t] + correction
        next_value = values[t]
    return advantages, returns


def update_return_stats(stats, rewards, dones, sums, owners, gamma, world_size):
    """Update stats by the discounted sums of rewards; rewards and dones are (num_steps, num_envs, heads).

    sums (num_actors, num_envs / num_actors, heads) holds each environment's sum so far, which ends where dones is 1;
    owners are the batch's actors.
    """
    returns = torch.empty_like(rewards)
    width = sums.shape[1]
    for i, actor in enumerate(owners):  # one by one: an actor that is fast may own several, one after the other
        columns = slice(i * width, (i + 1) * width)
        for t in range(len(rewards)):
            sums[actor] = gamma * sums[actor] + rewards[t, columns]
            returns[t, columns] = sums[actor]
            sums[actor] = (1 - dones[t, columns]) * sums[actor]
    stats.update(returns.flatten(0, 1), world_size)


def compute_loss(agent, args, obs, actions, logprobs, lag_ratios, advantages, returns, values):
    """Of a minibatch: the loss, and without gradients the approximate KL divergence and the terms that are logged."""
    policy = agent.get_policy(obs)
    newvalue = agent.get_value(obs)
    logratio = policy.log_prob(actions) - logprobs
    ratio = logratio.exp()  # (minibatch,)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = (lag_ratios * torch.max(pg_loss1, pg_loss2)).mean()
    # Value loss
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_step = (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (values + v_step - returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    # Entropy
    entropy = policy.entropy().mean()
    loss = pg_loss + args.vf_coef * v_loss
    if args.ent_coef:  # or its gradient would be computed for nothing
        loss = loss - args.ent_coef * entropy
    # How far the policy has moved: http://joschu.net/blog/kl-approx.html
    old_approx_kl = (-logratio).mean()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    terms = [v_loss, pg_loss, entropy, old_approx_kl, approx_kl, clipfrac]
    return loss, approx_kl.detach(), torch.stack(terms).detach()


# -------------------- Actors ------------------------------------------------------------------------------------------


NOISE_CORRELATION = 0.9  # of lasting noise, from one step to the next


@torch.no_grad()
def collect(agent, envs, observations, generator, fragment, progress):
    """Fill the fragment, starting from `observations`; returns those that come next. `progress` goes from 0 to 1."""
    device = agent.actor[0].weight.device
    lasting = math.ceil(agent.lasting_noise * (1 - progress) * envs.num_envs)  # environments, the first ones
    noise = torch.randn(fragment["actions"][0, :lasting].shape, generator=generator)  # of these
    for step in range(len(fragment["rewards"])):
        fragment["obs"][step] = observations
        policy = agent.get_policy(to_tensor(observations, device))
        actions = policy.sample(generator)
        if lasting:
            actions[:lasting] = policy.mean[:lasting] + policy.logstd.exp() * noise.to(device)
            fresh = torch.randn(noise.shape, generator=generator)
            noise = NOISE_CORRELATION * noise + (1 - NOISE_CORRELATION**2) ** 0.5 * fresh
        fragment["actions"][step] = actions.cpu().numpy()
        fragment["logprobs"][step] = policy.log_prob(actions).cpu().numpy()
        observations, rewards, terminations, truncations, infos = envs.step(policy.squash(actions).cpu().numpy())
        fragment["rewards"][step] = rewards
        fragment["terminations"][step] = terminations
        fragment["truncations"][step] = truncations
        if "episode" in infos:
            fragment["final_obs"][step] = infos["final_obs"]
            fragment["stats"][step] = np.stack([*infos["episode"].values()], axis=-1)
    fragment["obs"][-1] = observations
    return observations


def act(args, num_iterations, seed, todo, published):
    """An actor, as StreamPool runs it: fill each fragment of `todo` by the newest policy, and yield its version."""
    with make_all(args, args.num_envs // args.num_actors, 0, args.env_kwargs, checked=True) as stages:
        agent = Agent(args, stages[0])
        weights = flatten(agent)
        generator = torch.Generator().manual_seed(seed)
        envs = None
        for fragment in todo:
            version = published.read(weights.numpy())  # into the weights, and so into the agent
            stage = published.stage
            if envs is not stages[stage]:
                envs = stages[stage]
                observations, _ = envs.reset(seed=seed + stage)
            observations = collect(agent, envs, observations, generator, fragment, version / num_iterations)
            yield version


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    _, world_size, device = setup(args)

    # Environments first: workers have to be forked before torch starts threads. Actors make their own, as these are
    num_workers = 0 if args.num_actors else args.num_workers
    stages = make_all(args, args.num_envs // max(1, args.num_actors), num_workers, args.env_kwargs)
    envs = stages[0]

    torch.manual_seed(args.seed)  # the same weights in all processes of a torchrun; Run seeds each anew
    agent = Agent(args, envs).to(device)
    weights = flatten(agent)  # all parameters, as views of one vector; so are the gradients, of weights.grad
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    if args.init_from:
        agent.load_state_dict(load(args.init_from)["model"])
    if args.evaluate:
        evaluate_model(args, agent, args.eval_env_id, args.eval_env_kwargs)
        raise SystemExit

    steps_per_iteration = args.num_steps * args.num_envs * world_size
    total_steps = args.total_timesteps // steps_per_iteration * steps_per_iteration
    # Heads of the critic: the environment's rewards and, with rnd_coef, the intrinsic ones
    gamma = torch.tensor([args.gamma, args.rnd_gamma] if args.rnd_coef else [args.gamma], device=device)
    coefs = torch.tensor([1.0, args.rnd_coef] if args.rnd_coef else [1.0], device=device)
    reward_sums = torch.zeros(max(1, args.num_actors), envs.num_envs, len(gamma), device=device)  # discounted, so far

    run = Run(args, agent.make_policy, total_steps, args.eval_env_id, args.eval_env_kwargs)
    if run.checkpoint:
        with run.restoring():
            agent.load_state_dict(run.checkpoint["model"])
            optimizer.load_state_dict(run.checkpoint["optimizer"])
            reward_sums[...] = run.own["reward_sums"]

    # The actors; with --num-actors 0 there are none, and what an actor has is in this process
    envs = stages[run.stage]
    new_fragment = partial(make_fragment, envs, args.num_steps)
    actor = partial(act, args, total_steps // steps_per_iteration)
    actors = StreamPool(actor, args.num_actors, new_fragment, args.max_lag, run.make_seed)
    actors.start(weights.numpy(force=True), run.step // steps_per_iteration, run.stage)
    if not args.num_actors:
        fragment = new_fragment()
        seed = run.make_seed(0, 0)
        generator = torch.Generator().manual_seed(seed)
        observations, _ = envs.reset(seed=seed)
        if run.checkpoint and envs.has_state:
            with run.restoring():
                generator.set_state(run.own["generator"])
                observations, _ = envs.set_state(run.own["envs"])

    if args.compile:  # and draw the random numbers that are drawn without it
        compute_loss = torch.compile(compute_loss, options={"fallback_random": True})

    while run.step < total_steps:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / total_steps)

        # Rollout
        run.clock("rollout")  # in which an asynchronous learner only waits
        if args.num_actors:
            owners, fragments, lags = actors.take(args.num_actors, run)
        else:
            observations = collect(agent, envs, observations, generator, fragment, run.step / total_steps)
            owners = [0]
            fragments = [fragment]
            lags = [0]
        run.clock("update")
        data = {}  # (num_steps, num_envs, ...) each, obs one step more
        for name in fragments[0]:
            data[name] = torch.cat([torch.from_numpy(part[name]) for part in fragments], dim=1).to(device)
        obs = data["obs"][:-1]
        actions = data["actions"]
        logprobs = data["logprobs"]
        done = data["terminations"] | data["truncations"]
        cut_off = data["truncations"] & ~data["terminations"]
        dones = done.float().unsqueeze(-1)  # (num_steps, num_envs, 1), as rewards; below with intrinsic ones, 2
        rewards = args.reward_scale * data["rewards"].unsqueeze(-1)

        # Normalisation, and intrinsic rewards
        next_obs = torch.where(done.unsqueeze(-1), data["final_obs"], data["obs"][1:])
        if args.rnd_coef or args.norm_obs:
            agent.obs_stats.update(next_obs.flatten(0, 1), world_size)
        if args.rnd_coef:
            with torch.no_grad():
                novelty = agent.novelty(next_obs, agent.obs_stats)
            rewards = torch.cat([rewards, novelty.unsqueeze(-1)], dim=-1)
            dones = torch.cat([dones, torch.zeros_like(dones)], dim=-1)  # as in the paper, across episodes
        if args.rnd_coef or args.norm_reward:
            update_return_stats(agent.return_stats, rewards, dones, reward_sums, owners, gamma, world_size)
            std = agent.return_stats.std()  # (heads,)
            if args.norm_reward:  # the first rewards of an environment that seldom gives any would be huge
                rewards[..., 0] = (rewards[..., 0] / std[0]).clamp(-10, 10)
            rewards[..., 1:] /= std[1:]

        # Advantages: the policy before the update may be a later one than that which acted
        final_values = torch.zeros_like(rewards)
        with torch.no_grad():
            values = agent.get_value(data["obs"])
            final_values[cut_off] = agent.get_value(data["final_obs"][cut_off])
            old_logprobs = agent.get_policy(obs).log_prob(actions) if any(lags) else logprobs
        lag_ratios = (old_logprobs - logprobs).exp()  # 1 without a lag
        rho = lag_ratios.unsqueeze(-1).clamp(max=1) if args.vtrace else torch.ones_like(dones[..., :1])
        last_value = values[-1]
        values = values[:-1]
        advantages, returns = compute_gae(rewards, values, last_value, final_values, dones, rho, gamma, args.gae_lambda)
        advantages = (advantages * coefs).sum(-1)

        # Update
        batch = [obs, actions, old_logprobs, lag_ratios, advantages, returns, values]
        batch = [x.flatten(0, 1) for x in batch]  # (num_steps * num_envs, ...)
        losses = []  # of every minibatch
        for epoch in range(args.update_epochs):
            for mb_inds in torch.randperm(len(batch[0])).to(device).chunk(args.num_minibatches):
                minibatch = [x.index_select(0, mb_inds) for x in batch]  # for wide rows faster than x[mb_inds]
                loss, approx_kl, terms = compute_loss(agent, args, *minibatch)
                if args.rnd_coef and epoch == 0:  # the predictor's, once a batch, or soon nothing is novel
                    novelty = agent.novelty(next_obs.flatten(0, 1).index_select(0, mb_inds), agent.obs_stats)
                    loss = loss + novelty.mean()
                losses.append(terms)
                kl_exceeded = args.target_kl is not None and average(approx_kl.clone()) > args.target_kl
                if kl_exceeded:
                    break
                weights.grad.zero_()
                loss.backward()
                average(weights.grad)
                nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
                optimizer.step()
            if kl_exceeded:
                break
        if args.norm_obs:
            agent.obs_mean.copy_(agent.obs_stats.mean)
            agent.obs_std.copy_(agent.obs_stats.std())
        actors.publish(weights.numpy(force=True), run.step // steps_per_iteration + 1)
        actors.release()  # not before: they would be filled by the old weights

        # Log
        v_loss, pg_loss, entropy, old_approx_kl, approx_kl, clipfrac = torch.stack(losses).mean(0)
        scalars = {
            "losses/value_loss": v_loss,
            "losses/policy_loss": pg_loss,
            "losses/entropy": entropy,
            "losses/old_approx_kl": old_approx_kl,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/explained_variance": 1 - (returns - values)[..., 0].var() / returns[..., 0].var(),
            "charts/lag_mean": np.mean(lags),
            "charts/lag_max": max(lags),
            "charts/discarded": actors.discarded,  # fragments, up to now
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
        if not agent.discrete:
            scalars["losses/std"] = agent.actor_logstd.detach().exp().mean()
        if args.rnd_coef:
            scalars["losses/novelty"] = rewards[..., 1].mean()
        stats = data["stats"].movedim(-1, 0).cpu().numpy()  # (len(stat_names), num_steps, num_envs)
        run.add_episodes(dict(zip(envs.stat_names, stats, strict=True)), done.cpu().numpy())
        run.log(run.step + steps_per_iteration, scalars)
        run.evaluate(agent.state_dict())  # if it is time

        # The next stage, with episodes of its own
        if envs is not stages[run.stage]:
            envs = stages[run.stage]
            actors.set_stage(run.stage)
            if not args.num_actors:
                observations, _ = envs.reset(seed=run.make_seed())

        # Checkpoint: with actors one is kept after every iteration; `take` writes it if too many of them die
        if run.checkpoint_due() or args.num_actors:
            own = {"reward_sums": reward_sums.cpu()}
            if not args.num_actors and envs.has_state:
                own |= {"generator": generator.get_state(), "envs": envs.get_state()}
            run.save({"model": agent.state_dict(), "optimizer": optimizer.state_dict()}, own)  # written if it is due
        if run.stopping:
            break

    stages.close()
    actors.close()
    run.finish(agent)
