"""PPO for swarms with memory: ppo_swarm.py, with an LSTM in actor and critic, and other defaults.

    python ppo_swarm_lstm.py                    train on LidarNavigation with 10 robots, then compare
        --env-id Swarm --policy attention       agents that pass messages to their neighbours
        --critic central                        MAPPO: a critic that sees the whole swarm
        --evaluate runs/NAME/model.pt --n-agents 100
    torchrun --nproc-per-node 2 SCRIPT          data-parallel: each process has environments of its own
    tensorboard --logdir runs

Clipped PPO (arXiv 1707.06347) with GAE (arXiv 1506.02438): IPPO (arXiv 2011.09533) or, with a central critic, which
also sees the mean over all agents, MAPPO (arXiv 2103.01955). How it departs from CleanRL's ppo_continuous_action.py:

1. A batch holds whole swarms (num_steps * num_envs, n_agents, ...), and steps are counted in agent-steps.
2. Actions are squashed by tanh into the action space, and their log-prob includes the change of variables.
3. An episode cut off by a time limit is bootstrapped with the value of its last observation; a terminated one is not.
   dones[t] is 1 if an episode ended with step t; CleanRL's, if one began.
4. Observations and rewards are neither normalised nor clipped; with team_reward the agents share rewards, at first.
5. Every agent has an LSTM state of its own, zero where an episode starts; minibatches hold whole environments.
"""

import math
import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs import NEIGHBOR_FEATURES, Run, average, check_args, evaluate_model, flatten, load, make_all, parse_args, setup


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
    eval_every: int = 400_000  # agent-steps between evaluations
    eval_episodes: int = 100  # held-out episodes in an evaluation
    checkpoint_every: int = 400_000  # agent-steps between checkpoints

    env_id: str = "LidarNavigation"  # an environment of many agents, of envs.py or your own, as in: module:Id
    n_agents: int = 10  # agents in each environment
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # its arguments, as in: dt 0.1
    train_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # in training only; 9,5: stages
    stage_returns: str | None = None  # eval/r that ends each stage but the last, as in 5,12; None: equal shares
    num_envs: int = 64  # environments stepped together, by each process of a torchrun
    num_workers: int | None = None  # processes to step them in; 0 is this one, None picks by what is being stepped

    policy: Literal["mlp", "gnn", "attention"] = "mlp"  # actor and critic; gnn and attention pass messages
    critic: Literal["local", "central"] = "local"  # local is IPPO, central also sees the mean over the swarm (MAPPO)
    share_policy: bool = True  # one policy for all agents, or each its own
    share_critic: bool = True  # one critic for all agents, or each its own
    hidden_dim: int = 64  # width of the layers
    hops: int = 1  # rounds of messages in gnn and attention
    share_lstm: bool = False  # the critic has the actor's layers and LSTM, instead of its own
    init_logstd: float = -0.7  # log of the standard deviation at the start, before the squashing

    total_timesteps: int = 8_000_000  # agent-steps to train for
    learning_rate: float = 1e-3  # the step size of Adam
    num_steps: int = 32  # steps of each environment in a rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    team_reward: float | None = None  # share of the swarm's mean in rewards, falling to 0; None: 1 in Swarm, else 0
    gamma: float = 0.98  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches in an epoch
    update_epochs: int = 4  # epochs over a rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    guess_coef: float = 0.0  # weight of the loss of guessing infos["unseen"], which is known in training only
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # end an update when the approximate KL divergence exceeds this

    def __post_init__(self):
        check_args(self, rows=self.num_envs)
        # To gather is the hard part of the task, and a larger share of short episodes
        if self.env_id == "Swarm" and "max_steps" not in self.env_kwargs:
            self.train_kwargs = {"max_steps": 60} | self.train_kwargs
        if self.team_reward is None:
            self.team_reward = 1.0 if self.env_id == "Swarm" else 0.0  # with 0, some swarms settle wide apart


# -------------------- Network -----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A layer that all agents share (`n_agents` None), or one for each, as one batched product; orthogonal weights."""

    def __init__(self, n_in, n_out, n_agents, std=2**0.5):
        super().__init__()
        weights = [nn.init.orthogonal_(torch.empty(n_out, n_in), std) for _ in range(n_agents or 1)]
        self.weight = nn.Parameter(torch.stack(weights))  # (n_agents or 1, n_out, n_in)
        self.bias = nn.Parameter(torch.zeros(n_agents or 1, n_out))

    def forward(self, x):  # (batch, n_agents, n_in) to (batch, n_agents, n_out)
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0], self.bias[0])
        return torch.einsum("bni,noi->bno", x, self.weight) + self.bias


class Trunk(nn.Module):
    """Observations (batch, n_agents, obs_dim) to features (batch, n_agents, hidden_dim).

    mlp sees the agent's own observation. gnn and attention then exchange `hops` messages along `neighbors` (batch,
    n_agents, n_neighbors), each a round of communication: i hears from j a function of j's features and of how i sees
    j, and takes the mean over its neighbours, or the mean weighted by attention.
    """

    def __init__(self, args, obs_dim, n_agents):
        super().__init__()
        self.policy = args.policy
        hidden = args.hidden_dim
        message = args.hidden_dim // 2
        hops = 1 if self.policy == "mlp" else args.hops
        self.embed = Linear(obs_dim, hidden, n_agents)
        self.update = nn.ModuleList(Linear(hidden, hidden, n_agents) for _ in range(hops))
        if self.policy != "mlp":
            self.send = nn.ModuleList(Linear(hidden, message, n_agents) for _ in range(hops))
            self.edge = nn.ModuleList(Linear(NEIGHBOR_FEATURES, message, None) for _ in range(hops))  # always shared
            self.hear = nn.ModuleList(Linear(message, hidden, n_agents) for _ in range(hops))
        if self.policy == "attention":
            self.query = nn.ModuleList(Linear(hidden, message, n_agents) for _ in range(hops))

    def forward(self, obs, neighbors):
        x = torch.tanh(self.embed(obs))
        if self.policy == "mlp":
            return torch.tanh(self.update[0](x))
        batch, n_agents, n_neighbors = neighbors.shape
        seen = obs[..., : n_neighbors * NEIGHBOR_FEATURES].unflatten(-1, (n_neighbors, NEIGHBOR_FEATURES))
        present = seen[..., -1]  # (batch, n_agents, n_neighbors), 0 or 1
        sender = (neighbors + n_agents * torch.arange(batch, device=obs.device)[:, None, None]).flatten()
        for hop, update in enumerate(self.update):
            sent = self.send[hop](x).flatten(0, 1)[sender].view(*neighbors.shape, -1)
            messages = torch.relu(sent + self.edge[hop](seen))  # (batch, n_agents, n_neighbors, hidden_dim // 2)
            weights = present / present.sum(-1, keepdim=True).clamp(min=1)
            if self.policy == "attention":
                scores = (messages * self.query[hop](x).unsqueeze(-2)).sum(-1) / messages.shape[-1] ** 0.5
                weights = scores.masked_fill(present == 0, -1e9).softmax(-1) * present
            heard = (weights.unsqueeze(-1) * messages).sum(-2)  # faster here than a batched product, forwards and back
            x = torch.tanh(update(x) + self.hear[hop](heard))
        return x


class RecurrentTrunk(Trunk):
    """A Trunk, and what an LSTM adds to its features, every agent with a state (h, c) of its own.

    obs and neighbors are (batch, n_agents, ...), or sequences (batch, steps, n_agents, ...); state (batch, n_agents, 2,
    hidden_dim) is that before them, and 0 where starts, (batch, 1) or (batch, steps, 1), is 1. Returns features (batch
    * steps, n_agents, hidden_dim) and the state after the last step.
    """

    def __init__(self, args, obs_dim, n_agents):
        super().__init__(args, obs_dim, n_agents)
        hidden = args.hidden_dim
        self.memories = nn.ModuleList(nn.LSTM(hidden, hidden, batch_first=True) for _ in range(n_agents or 1))
        for name, parameter in self.memories.named_parameters():
            nn.init.orthogonal_(parameter) if "weight" in name else nn.init.zeros_(parameter)

    def forward(self, obs, neighbors, starts, state):
        x = super().forward(obs.flatten(0, -3), neighbors.flatten(0, -3)).unflatten(0, (len(obs), -1))
        starts = starts.view(len(obs), -1, 1, 1, 1)
        cuts = sorted({0, *starts.any(0).nonzero()[:, 0].tolist(), x.shape[1]})
        features = []
        own = len(self.memories)  # 1, or n_agents
        for first, last in pairwise(cuts):  # no start in between: 1.4 to 2.1 times as fast as step by step
            state = state * (1 - starts[:, first])
            agents = zip(self.memories, x[:, first:last].chunk(own, dim=2), state.chunk(own, dim=1), strict=True)
            outputs, states = zip(*[self.run(*agent) for agent in agents], strict=True)
            features.append(torch.cat(outputs, dim=2))
            state = torch.cat(states, dim=1)
        return (x + torch.cat(features, 1)).flatten(0, 1), state

    def run(self, lstm, x, state):
        out, hc = lstm(x.transpose(1, 2).flatten(0, 1), tuple(torch.stack(state.unbind(2)).flatten(1, 2).unsqueeze(1)))
        return out.unflatten(0, (len(x), -1)).transpose(1, 2), torch.stack(hc, 2).view_as(state)


class Agent(nn.Module):
    """Actor and critic; inputs and outputs are (batch, n_agents, ...)."""

    def __init__(self, args, envs):
        super().__init__()
        obs_dim = envs.single_observation_space.shape[-1]
        act_dim = envs.single_action_space.shape[-1]
        policy_agents = None if args.share_policy else args.n_agents
        critic_agents = None if args.share_critic else args.n_agents
        self.actor = RecurrentTrunk(args, obs_dim, policy_agents)
        self.actor_mean = Linear(args.hidden_dim, act_dim + envs.unseen_dim, policy_agents, std=0.01)
        self.actor_logstd = nn.Parameter(torch.full((policy_agents or 1, act_dim), args.init_logstd))
        self.critic = None if args.share_lstm else RecurrentTrunk(args, obs_dim, critic_agents)
        self.central = args.critic == "central"
        self.critic_value = Linear(args.hidden_dim * (2 if self.central else 1), 1, critic_agents, std=1.0)
        self.register_buffer("action_low", torch.tensor(envs.single_action_space.low[0]), persistent=False)
        self.register_buffer("action_high", torch.tensor(envs.single_action_space.high[0]), persistent=False)

    def get_value(self, obs, neighbors, starts, memory):
        features, state = (self.critic or self.actor)(obs, neighbors, starts, memory[:, :, 1])
        if self.central:
            features = torch.cat([features, features.mean(dim=1, keepdim=True).expand_as(features)], dim=-1)
        return self.critic_value(features).view(obs.shape[:-1]), state

    def get_policy(self, obs, neighbors, starts, memory):
        features, state = self.actor(obs, neighbors, starts, memory[:, :, 0])
        mean, guess = self.actor_mean(features).view(*obs.shape[:-1], -1).tensor_split([len(self.action_low)], dim=-1)
        policy = SquashedNormal(mean, self.actor_logstd, self.action_low, self.action_high)
        policy.guess = guess  # of what the agent does not see
        return policy, state

    def make_policy(self, envs, greedy=True):
        """The policy on arrays, as envs.py evaluates it: the mode of its actions, or drawn as in training."""
        generator = torch.Generator().manual_seed(0)
        memory = self.action_low.new_zeros(*envs.observation_space.shape[:2], 1, 2, self.actor.memories[0].hidden_size)

        @torch.no_grad()
        def act(observations, infos):
            starts = torch.as_tensor(infos.get("_episode", np.zeros(envs.num_envs))).to(memory)
            policy, memory[:, :, 0] = self.get_policy(*to_tensors(observations, infos, memory.device), starts, memory)
            return policy.squash(policy.mode if greedy else policy.sample(generator)).cpu().numpy()

        return act


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


def to_tensors(observations, infos, device):
    """Observations and neighbour indices; (num_envs, n_agents, 0) where the environment reports no neighbours."""
    neighbors = infos.get("neighbors", np.zeros((*observations.shape[:2], 0), np.int64))
    return torch.as_tensor(observations, device=device), torch.as_tensor(neighbors, device=device)


# -------------------- Algorithm ---------------------------------------------------------------------------------------


def compute_gae(rewards, values, last_value, final_values, dones, gamma, gae_lambda):
    """Advantages (num_steps, num_envs, n_agents); so are rewards, values and final_values. dones are (..., 1).

    Where dones is 1 an episode ended, and what came next was worth final_values: V(final_obs) if a time limit cut it
    off, 0 if it terminated. The next step belongs to another episode, and nothing of it counts here.
    """
    advantages = torch.zeros_like(rewards)
    advantage = 0
    next_value = last_value
    for t in reversed(range(len(rewards))):
        next_value = (1 - dones[t]) * next_value + dones[t] * final_values[t]
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * gae_lambda * (1 - dones[t]) * advantage
        advantages[t] = advantage
        next_value = values[t]
    return advantages


def compute_loss(agent, args, raw_actions, logprobs, advantages, returns, values, unseen, *inputs):
    """Of a minibatch: the loss, and without gradients the approximate KL divergence and the terms that are logged."""
    policy, _ = agent.get_policy(*inputs)  # obs, neighbors, starts, memory
    newvalue, _ = agent.get_value(*inputs)
    logratio = policy.log_prob(raw_actions) - logprobs
    ratio = logratio.exp()  # (minibatch, ..., n_agents)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    # Value loss
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_step = (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (values + v_step - returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    # Entropy
    entropy = policy.entropy().mean()
    # The guess of what the agents do not see
    guess_loss = ((policy.guess - unseen) ** 2).sum(-1).mean()
    loss = pg_loss + args.vf_coef * v_loss + args.guess_coef * guess_loss
    if args.ent_coef:  # or its gradient would be computed for nothing
        loss = loss - args.ent_coef * entropy
    # How far the policy has moved: http://joschu.net/blog/kl-approx.html
    old_approx_kl = (-logratio).mean()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    terms = [v_loss, pg_loss, entropy, guess_loss, old_approx_kl, approx_kl, clipfrac]
    return loss, approx_kl.detach(), torch.stack(terms).detach()


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    rank, world_size, device = setup(args)

    # Environments first: workers have to be forked before torch starts threads
    env_kwargs = {"n_agents": args.n_agents, **args.env_kwargs}
    stages = make_all(args, args.num_envs, args.num_workers, env_kwargs)
    envs = stages[0]
    # The first episodes begin part-way through their time, so that every rollout holds all parts of an episode
    seed = args.seed + (rank << 32)  # no other rank's: --seed is below 2**32
    observations, infos = envs.reset(seed=seed, options={"stagger": True})

    torch.manual_seed(args.seed)  # the same weights in all processes of a torchrun; Run seeds each anew
    agent = Agent(args, envs).to(device)
    weights = flatten(agent)  # all parameters, as views of one vector; so are the gradients, of weights.grad
    optimizer = torch.optim.Adam([weights], lr=args.learning_rate, eps=1e-5, fused=True)
    if args.init_from:
        agent.load_state_dict(load(args.init_from)["model"])
    if args.evaluate:
        evaluate_model(args, agent, args.env_id, env_kwargs)
        raise SystemExit

    steps_per_iteration = args.num_steps * args.num_envs * args.n_agents * world_size  # agent-steps of the task
    total_steps = args.total_timesteps // steps_per_iteration * steps_per_iteration
    dones = torch.zeros((args.num_steps, args.num_envs, 1), device=device)  # of all agents of an environment
    memory = dones.new_zeros((*observations.shape[:2], 2, 2, args.hidden_dim))  # of actor and critic, h and c

    run = Run(args, agent.make_policy, total_steps, args.env_id, env_kwargs)
    if run.checkpoint:
        with run.restoring():
            agent.load_state_dict(run.checkpoint["model"])
            optimizer.load_state_dict(run.checkpoint["optimizer"])
            envs = stages[run.stage]
            observations, infos = envs.set_state(run.own["envs"])
            memory = run.own["memory"].to(device)

    if args.compile:  # and draw the random numbers that are drawn without it
        compute_loss = torch.compile(compute_loss, options={"fallback_random": True})

    while run.step < total_steps:
        remaining = 1 - run.step / total_steps  # share of the training
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
        team_share = args.team_reward * remaining

        # Storage, of this iteration: a stage may have another number of agents
        first_obs, first_neighbors = to_tensors(observations, infos, device)
        shape = (args.num_steps, *first_obs.shape[:2])  # (num_steps, num_envs, n_agents)
        obs = torch.zeros((*shape, first_obs.shape[-1]), device=device)
        neighbors = torch.zeros((*shape, first_neighbors.shape[-1]), dtype=torch.int64, device=device)
        raw_actions = torch.zeros((*shape, envs.single_action_space.shape[-1]), device=device)
        logprobs = torch.zeros(shape, device=device)
        rewards = torch.zeros(shape, device=device)
        values = torch.zeros(shape, device=device)
        final_values = torch.zeros(shape, device=device)
        unseen = torch.zeros((*shape, envs.unseen_dim), device=device)

        # Rollout
        run.clock("rollout")
        first_memory = memory.clone()
        for step in range(args.num_steps):
            obs[step], neighbors[step] = to_tensors(observations, infos, device)
            if envs.unseen_dim:
                unseen[step] = torch.from_numpy(infos["unseen"])
            with torch.no_grad():
                policy, memory[:, :, 0] = agent.get_policy(obs[step], neighbors[step], dones[step - 1], memory)
                values[step], memory[:, :, 1] = agent.get_value(obs[step], neighbors[step], dones[step - 1], memory)
                raw_actions[step] = policy.sample()
                logprobs[step] = policy.log_prob(raw_actions[step])
                actions = policy.squash(raw_actions[step]).cpu().numpy()
            observations, reward, terminations, truncations, infos = envs.step(actions)
            rewards[step] = torch.from_numpy(reward + team_share * (reward.mean(-1, keepdims=True) - reward))
            dones[step, :, 0] = torch.from_numpy(terminations | truncations)
            # Bootstrap what a time limit cut off
            cut_off = truncations & ~terminations  # (num_envs,)
            if cut_off.any():
                with torch.no_grad():
                    final = to_tensors(infos["final_obs"], infos["final_info"], device)
                    final_value, _ = agent.get_value(*final, torch.zeros_like(dones[step]), memory)
                final_values[step, cut_off] = final_value[cut_off]
            if "episode" in infos:
                run.add_episodes(infos["episode"], infos["_episode"])

        # Advantages
        with torch.no_grad():
            last_value, _ = agent.get_value(*to_tensors(observations, infos, device), dones[-1], memory)
        memory *= 1 - dones[-1, ..., None, None, None]  # zero where the last step ended an episode
        advantages = compute_gae(rewards, values, last_value, final_values, dones, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update
        run.clock("update")
        batch = [raw_actions, logprobs, advantages, returns, values, unseen, obs, neighbors]
        batch += [torch.cat([torch.zeros_like(dones[:1]), dones[:-1]])]  # where episodes start
        batch = [*(x.transpose(0, 1) for x in batch), first_memory]  # (num_envs, num_steps, ...); no steps in memory
        losses = []  # of every minibatch
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(len(batch[0])).to(device).chunk(args.num_minibatches):
                minibatch = [x.index_select(0, mb_inds) for x in batch]  # for wide rows faster than x[mb_inds]
                loss, approx_kl, terms = compute_loss(agent, args, *minibatch)
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

        # Log
        v_loss, pg_loss, entropy, guess_loss, old_approx_kl, approx_kl, clipfrac = torch.stack(losses).mean(0)
        scalars = {
            "losses/value_loss": v_loss,
            "losses/policy_loss": pg_loss,
            "losses/entropy": entropy,
            "losses/guess_loss": guess_loss,
            "losses/old_approx_kl": old_approx_kl,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/explained_variance": 1 - (returns - values).var() / returns.var(),
            "losses/std": agent.actor_logstd.detach().exp().mean(),
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
        }
        run.log(run.step + math.prod(shape) * world_size, scalars)
        run.evaluate(agent.state_dict())  # if it is time

        # The next stage, with episodes of its own
        if envs is not stages[run.stage]:
            envs = stages[run.stage]
            observations, infos = envs.reset(seed=run.make_seed(), options={"stagger": True})
            memory = dones.new_zeros((*observations.shape[:2], 2, 2, args.hidden_dim))

        # Checkpoint
        if run.checkpoint_due():
            own = {"envs": envs.get_state()}  # of this process alone
            own["memory"] = memory.cpu()
            run.save({"model": agent.state_dict(), "optimizer": optimizer.state_dict()}, own)
        if run.stopping:
            break

    stages.close()
    run.finish(agent)
