"""PPO for swarms with memory: ppo_swarm.py, with an LSTM in actor and critic, and other defaults.

    python ppo_swarm_lstm.py                    train on LidarNavigation with 10 robots, then compare
        --env-id Swarm --policy attention       agents that pass messages to their neighbours
        --critic central                        MAPPO: a critic that sees the whole swarm
        --evaluate runs/NAME/model.pt --n-agents 100
    torchrun --nproc-per-node 2 ppo_swarm_lstm.py    data-parallel: each process has environments of its own
    tensorboard --logdir runs

The algorithm is clipped PPO (arXiv 1707.06347) with GAE (arXiv 1506.02438). `--critic local` makes it IPPO (arXiv
2011.09533), `--critic central` MAPPO (arXiv 2103.01955) with a critic that pools over the swarm, so that it takes any
number of agents. How it departs from CleanRL's ppo_continuous_action.py:

1. A batch holds whole swarms (num_steps * num_envs, n_agents, ...), and steps are counted in agent-steps.
2. Actions are squashed by tanh into the action space, and their log-prob includes the change of variables.
3. An episode cut off by a time limit is bootstrapped with the value of its last observation; a terminated one is not.
4. Observations and rewards are taken as they come, neither normalised nor clipped.
5. The logged losses are means over the update's minibatches, and target_kl is tested before every gradient step.
6. Every agent has an LSTM state of its own, zero where an episode starts, also in the middle of a rollout. A minibatch
   holds whole rollouts of some environments, run through again from the state that they began with.
"""

import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic CUDA asks for

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import NEIGHBOR_FEATURES, compare, evaluate, load, make_vec, open_run, record, save

VALIDATION_SEED, TEST_SEED = 2**62, 2**62 + 1  # held out: the seeds of training stay below


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
    eval_every: int = 400_000  # agent-steps between evaluations
    eval_episodes: int = 100  # held-out episodes in an evaluation
    checkpoint_every: int = 400_000  # agent-steps between checkpoints

    env_id: str = "LidarNavigation"  # a multi-agent environment of envs.py
    n_agents: int = 10  # agents in each environment
    # further arguments of the environment, as in: --env-kwargs box_size 10 noise 0.1
    env_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    num_envs: int = 32  # environments stepped together, by each process of a torchrun
    num_workers: int | None = None  # processes to step them in; 0 is this one, None picks by what is being stepped

    policy: Literal["mlp", "gnn", "attention"] = "mlp"  # actor and critic; gnn and attention pass messages
    critic: Literal["local", "central"] = "local"  # local is IPPO, central also sees the mean over the swarm (MAPPO)
    share_policy: bool = True  # one policy for all agents, or each its own
    share_critic: bool = True  # one critic for all agents, or each its own
    hidden_dim: int = 64  # width of the layers
    hops: int = 1  # rounds of messages in gnn and attention
    share_lstm: bool = False  # the critic reads the actor's features and memory, instead of having its own
    init_logstd: float = -0.7  # log of the standard deviation at the start, before the squashing

    total_timesteps: int = 8_000_000  # agent-steps to train for
    learning_rate: float = 1e-3  # the step size of Adam
    num_steps: int = 64  # steps of each environment in a rollout
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches in an epoch
    update_epochs: int = 4  # epochs over a rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move
    clip_vloss: bool = False  # clip the value loss as well
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = None  # end an update when the approximate KL divergence exceeds this

    def __post_init__(self):
        limits = {
            "num_envs num_steps num_minibatches update_epochs hops": (1, math.inf),
            "eval_every eval_episodes checkpoint_every": (1, math.inf),
            "hidden_dim": (2, math.inf),
            "learning_rate clip_coef max_grad_norm target_kl": (1e-12, 1e12),
            "ent_coef vf_coef": (0, 1e12),
            "gamma gae_lambda": (0, 1),
            "init_logstd": (-20, 5),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ((name, limit) for names, limit in limits.items() for name in names.split()):
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from {low} to {high}")
        if self.num_envs % self.num_minibatches:
            raise ValueError(f"num_minibatches is {self.num_minibatches}: it must divide num_envs")
        if self.num_steps * self.num_envs * self.n_agents == self.num_minibatches:  # one advantage has no deviation
            raise ValueError(f"num_minibatches is {self.num_minibatches}: minibatches need two agent-steps or more")
        if "n_agents" in self.env_kwargs:
            raise ValueError(f"env_kwargs is {self.env_kwargs}: n_agents must be given by itself, as --n-agents")


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
        self.policy, hidden, message = args.policy, args.hidden_dim, args.hidden_dim // 2
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
    """A Trunk with an LSTM behind it, every agent with a state (h, c) of its own.

    obs and neighbors are (batch, n_agents, ...), or (batch, steps, n_agents, ...): whole sequences. state (2, batch,
    n_agents, hidden_dim) is that before the first step; where starts (batch,) or (batch, steps) is 1 it is zero, and no
    gradient gets past there. Returns features (batch * steps, n_agents, hidden_dim) and the state after the last step.
    """

    def __init__(self, args, obs_dim, n_agents):
        super().__init__(args, obs_dim, n_agents)
        lstms = (nn.LSTM(args.hidden_dim, args.hidden_dim, batch_first=True) for _ in range(n_agents or 1))
        self.lstms = nn.ModuleList(lstms)
        for name, parameter in self.lstms.named_parameters():
            nn.init.orthogonal_(parameter, 1.0) if "weight" in name else nn.init.zeros_(parameter)

    def forward(self, obs, neighbors, state, starts):
        x = super().forward(obs.flatten(0, -3), neighbors.flatten(0, -3)).unflatten(0, (len(obs), -1))
        groups = zip(self.lstms, x.chunk(len(self.lstms), dim=2), state.chunk(len(self.lstms), dim=2), strict=True)
        features, states = zip(*[self.run(*group, starts.view(len(obs), -1)) for group in groups], strict=True)
        return torch.cat(features, dim=2).flatten(0, 1), torch.cat(states, dim=2)

    def run(self, lstm, x, state, starts):
        sequences, hc = x.transpose(1, 2).flatten(0, 1), state.flatten(1, 2)  # (batch * n_agents, steps, hidden_dim)
        starts, stretches = starts.repeat_interleave(x.shape[2], dim=0), []
        # From one start, in any of the sequences, to the next, torch's LSTM runs through all steps in one call.
        for first, last in pairwise(sorted({0, x.shape[1], *starts.any(dim=0).nonzero().flatten().tolist()})):
            features, hc = lstm(sequences[:, first:last], tuple((hc * (1 - starts[:, first, None])).unsqueeze(1)))
            hc = torch.cat(hc)  # (2, batch * n_agents, hidden_dim)
            stretches.append(features)
        return torch.cat(stretches, dim=1).unflatten(0, (len(x), -1)).transpose(1, 2), hc.view_as(state)


class Agent(nn.Module):
    """Actor and critic; inputs and outputs are (batch, n_agents, ...)."""

    def __init__(self, args, envs):
        super().__init__()
        obs_dim, act_dim = envs.single_observation_space.shape[-1], envs.single_action_space.shape[-1]
        policy_agents = None if args.share_policy else args.n_agents
        critic_agents = None if args.share_critic else args.n_agents
        self.actor = RecurrentTrunk(args, obs_dim, policy_agents)
        self.actor_mean = Linear(args.hidden_dim, act_dim, policy_agents, std=0.01)
        self.actor_logstd = nn.Parameter(torch.full((policy_agents or 1, act_dim), args.init_logstd))
        self.critic = None if args.share_lstm else RecurrentTrunk(args, obs_dim, critic_agents)
        self.central = args.critic == "central"
        self.critic_value = Linear(args.hidden_dim * (2 if self.central else 1), 1, critic_agents, std=1.0)
        low, high = torch.tensor(envs.single_action_space.low[0]), torch.tensor(envs.single_action_space.high[0])
        self.register_buffer("action_scale", (high - low) / 2, persistent=False)
        self.register_buffer("action_bias", (high + low) / 2, persistent=False)

    def get_value(self, obs, neighbors, state, starts):
        features, state = (self.critic or self.actor)(obs, neighbors, state, starts)
        if self.central:
            features = torch.cat([features, features.mean(dim=1, keepdim=True).expand_as(features)], dim=-1)
        return self.critic_value(features).view(obs.shape[:-1]), state

    def get_policy(self, obs, neighbors, state, starts):
        features, state = self.actor(obs, neighbors, state, starts)
        mean = self.actor_mean(features).view(*obs.shape[:-1], -1)
        return SquashedNormal(mean, self.actor_logstd, self.action_scale, self.action_bias), state

    def make_policy(self, envs):
        """The deterministic policy on arrays, as envs.py evaluates it."""
        n_agents, hidden_dim = envs.single_observation_space.shape[0], self.actor.lstms[0].hidden_size
        state = torch.zeros(2, envs.num_envs, n_agents, hidden_dim, device=self.action_scale.device)

        @torch.no_grad()
        def act(observations, infos):
            nonlocal state
            starts = torch.as_tensor(infos.get("_episode", np.zeros(envs.num_envs))).to(state)
            policy, state = self.get_policy(*to_tensors(observations, infos, state.device), state, starts)
            return policy.squash(policy.mean).cpu().numpy()

        return act


class SquashedNormal:
    """scale * tanh(u) + bias with u ~ Normal(mean, exp(logstd)); mean and u are (batch, n_agents, act_dim).

    Actions are kept as u, so that tanh never has to be inverted; log_prob and entropy are those of the squashed action.
    """

    def __init__(self, mean, logstd, scale, bias):
        self.mean, self.logstd, self.scale, self.bias = mean, logstd, scale, bias

    def sample(self):
        noise = torch.randn(self.mean.shape).to(self.mean.device)  # on the CPU, with any device
        return self.mean + self.logstd.exp() * noise

    def squash(self, u):
        return self.scale * torch.tanh(u) + self.bias

    def log_prob(self, u):
        z = (u - self.mean) * torch.exp(-self.logstd)
        return (-0.5 * z**2 - self.logstd - 0.5 * math.log(2 * math.pi) - self.log_slope(u)).sum(-1)

    def entropy(self):
        """The Normal's, and the mean of log_slope: that has no closed form, one reparameterised sample estimates it."""
        return (0.5 * math.log(2 * math.pi * math.e) + self.logstd + self.log_slope(self.sample())).sum(-1)

    def log_slope(self, u):
        """log of d action / d u, with log(1 - tanh(u)^2) as 2 (log 2 - u - softplus(-2 u)): keeps its digits."""
        return 2 * (math.log(2) - u - F.softplus(-2 * u)) + self.scale.log()


def to_tensors(observations, infos, device):
    """Observations and neighbour indices; (num_envs, n_agents, 0) where the environment reports no neighbours."""
    neighbors = infos.get("neighbors", np.zeros((*observations.shape[:2], 0), np.int64))
    return torch.as_tensor(observations, device=device), torch.as_tensor(neighbors, device=device)


# -------------------- Algorithm ---------------------------------------------------------------------------------------


def compute_gae(rewards, values, last_value, final_values, dones, gamma, gae_lambda):
    """Advantages (num_steps, num_envs, n_agents); so are rewards, values and final_values.

    Where dones (num_steps, num_envs) is 1 an episode ended: the value of what came next is then not that of the next
    step, which belongs to another episode, but final_values: V(final_obs) if a time limit cut the episode off, 0 if it
    terminated. Nothing else crosses that line.
    """
    advantages = torch.zeros_like(rewards)
    advantage, next_value = 0, last_value
    for t in reversed(range(len(rewards))):
        done = dones[t].unsqueeze(-1)
        next_value = (1 - done) * next_value + done * final_values[t]
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * (1 - done) * advantage
        next_value = values[t]
    return advantages


def approx_kl(logratio):
    """KL(old || new), estimated from actions of the old policy: http://joschu.net/blog/kl-approx.html."""
    return (logratio.exp() - 1 - logratio).mean()


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
        default = Args(**defaults | {"env_kwargs": {}, "init_from": None, "cuda": args.cuda})
        args = tyro.cli(Args, default=default)
        args.env_kwargs = defaults["env_kwargs"] | args.env_kwargs
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if args.cuda else torch.device("cpu")
    torch.set_deterministic_debug_mode("error" if args.torch_deterministic else "default")

    # Environments first: workers have to be forked before torch starts threads
    env_id, env_kwargs = args.env_id, {"n_agents": args.n_agents, **args.env_kwargs}
    envs = make_vec(env_id, args.num_envs, args.num_workers, **env_kwargs)
    observations, infos = envs.reset(seed=args.seed + (rank << 32))
    if args.cuda:
        torch.cuda.set_device(device)
    next_obs, next_neighbors = to_tensors(observations, infos, device)
    if args.policy != "mlp" and not next_neighbors.shape[-1]:
        raise ValueError(f"policy is {args.policy!r}: {env_id} reports no neighbours, so it must be 'mlp'")
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
        saved, new = load(args.evaluate)["model"], agent.state_dict()  # a critic of each agent's own need not fit
        agent.load_state_dict(saved | {name: new[name] for name in new if name.startswith("critic")})
        folder = Path(args.evaluate).parent / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        folder.mkdir()
        print(compare(policies, env_id, args.eval_episodes, TEST_SEED, folder, **env_kwargs)[1])
        print(f"In {folder}: {', '.join(sorted(os.listdir(folder)))}")
        raise SystemExit

    steps_per_iteration = args.num_steps * args.num_envs * args.n_agents * world_size  # agent-steps
    num_iterations = args.total_timesteps // steps_per_iteration
    if num_iterations < 1:
        raise ValueError(f"total_timesteps is {args.total_timesteps}: one rollout already has {steps_per_iteration}")

    # Storage
    shape = (args.num_steps, args.num_envs, args.n_agents)
    obs = torch.zeros((*shape, next_obs.shape[-1]), device=device)
    neighbors = torch.zeros((*shape, next_neighbors.shape[-1]), dtype=torch.int64, device=device)
    raw_actions = torch.zeros((*shape, envs.single_action_space.shape[-1]), device=device)
    logprobs, rewards, values, final_values = (torch.zeros(shape, device=device) for _ in range(4))
    dones = torch.zeros(shape[:2], device=device)
    actor_state, critic_state = torch.zeros(2, 2, *shape[1:], args.hidden_dim, device=device)

    # The run's folder, a new one or an unfinished run's
    run = [*open_run(asdict(args), world_size)] if rank == 0 else [None, None]
    if world_size > 1:
        dist.broadcast_object_list(run)
    run_dir, checkpoint = run
    iteration, best_score = 0, -math.inf
    # The ranks begin with the same weights and go on with draws of their own; torch reads only 32 bits of a seed.
    torch.manual_seed((args.seed + rank * 0x9E3779B9) % 2**32)
    if checkpoint:
        iteration, best_score, mine = checkpoint["iteration"], checkpoint["best_score"], checkpoint["ranks"][rank]
        agent.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(mine["rng"])
        actor_state, critic_state, dones[-1] = (tensor.to(device) for tensor in mine["memory"])
        state = {name: array.numpy() for name, array in mine["envs"].items()}
        next_obs, next_neighbors = to_tensors(*envs.set_state(state), device)
    global_step = first_step = iteration * steps_per_iteration  # agent-steps
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

    stopping, finished, start_time = False, iteration == num_iterations, time.time()
    progress = tqdm(total=num_iterations * steps_per_iteration, initial=global_step, unit_scale=True, disable=rank > 0)
    while not finished and not stopping:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)
        iteration += 1

        # Rollout
        rollout_start, episodes = time.time(), {}
        first_actor_state, first_critic_state, first_start = actor_state, critic_state, dones[-1:].clone()
        for step in range(args.num_steps):
            obs[step], neighbors[step] = next_obs, next_neighbors
            with torch.no_grad():
                policy, actor_state = agent.get_policy(next_obs, next_neighbors, actor_state, dones[step - 1])
                values[step], critic_state = agent.get_value(next_obs, next_neighbors, critic_state, dones[step - 1])
                raw_actions[step] = policy.sample()
                logprobs[step] = policy.log_prob(raw_actions[step])
                actions = policy.squash(raw_actions[step]).cpu().numpy()
            observations, reward, terminations, truncations, infos = envs.step(actions)
            next_obs, next_neighbors = to_tensors(observations, infos, device)
            rewards[step] = torch.from_numpy(reward)
            dones[step] = torch.from_numpy(terminations | truncations)
            final_values[step] = 0
            cut_off = truncations & ~terminations  # (num_envs,)
            if cut_off.any():
                with torch.no_grad():
                    final = to_tensors(infos["final_obs"], infos["final_info"], device)
                    final_value, _ = agent.get_value(*final, critic_state, torch.zeros_like(dones[step]))
                final_values[step, cut_off] = final_value[cut_off]
            for name, value in infos.get("episode", {}).items():
                episodes.setdefault(name, []).extend(value[infos["_episode"]])
        with torch.no_grad():
            last_value, _ = agent.get_value(next_obs, next_neighbors, critic_state, dones[-1])
        advantages = compute_gae(rewards, values, last_value, final_values, dones, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update
        update_start = time.time()
        b_obs, b_neighbors, b_raw_actions, b_logprobs, b_advantages, b_returns, b_values = (
            x.transpose(0, 1) for x in (obs, neighbors, raw_actions, logprobs, advantages, returns, values)
        )
        b_starts = torch.cat([first_start, dones[:-1]]).transpose(0, 1)  # (num_envs, num_steps)
        minibatches = (
            mb_inds
            for _ in range(args.update_epochs)
            for mb_inds in torch.randperm(len(b_obs)).to(device).chunk(args.num_minibatches)
        )
        losses, logratios = [], []  # of every minibatch
        for mb_inds in minibatches:
            # index_select copies whole rows, and is several times faster than b_obs[mb_inds]
            mb_obs, mb_neighbors = b_obs.index_select(0, mb_inds), b_neighbors.index_select(0, mb_inds)
            policy, _ = agent.get_policy(mb_obs, mb_neighbors, first_actor_state[:, mb_inds], b_starts[mb_inds])
            newvalue, _ = agent.get_value(mb_obs, mb_neighbors, first_critic_state[:, mb_inds], b_starts[mb_inds])
            logratio = policy.log_prob(b_raw_actions[mb_inds]) - b_logprobs[mb_inds]
            ratio = logratio.exp()  # (minibatch, ..., n_agents)
            mb_advantages = b_advantages[mb_inds]
            if args.norm_adv:
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = torch.max(pg_loss1, pg_loss2).mean()

            v_loss = (newvalue - b_returns[mb_inds]) ** 2
            if args.clip_vloss:
                v_clipped = b_values[mb_inds] + (newvalue - b_values[mb_inds]).clamp(-args.clip_coef, args.clip_coef)
                v_loss = torch.max(v_loss, (v_clipped - b_returns[mb_inds]) ** 2)
            v_loss = 0.5 * v_loss.mean()

            with torch.set_grad_enabled(args.ent_coef > 0):  # at 0 it is only logged, and its gradient a waste of time
                entropy = policy.entropy().mean()
            loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss

            losses.append(torch.stack([v_loss, pg_loss, entropy]).detach())
            logratios.append(logratio.detach())
            if args.target_kl is not None and average(approx_kl(logratios[-1]), world_size) > args.target_kl:
                break
            weights.grad.zero_()
            loss.backward()
            average(weights.grad, world_size)
            nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()

        # Log
        last_step, global_step, now = global_step, global_step + steps_per_iteration, time.time()
        if rank == 0:
            loss_names, losses = ("value_loss", "policy_loss", "entropy"), torch.stack(losses).mean(0)
            scalars = {f"losses/{name}": loss for name, loss in zip(loss_names, losses, strict=True)}
            logratio = torch.stack(logratios)
            scalars["losses/old_approx_kl"] = (-logratio).mean()
            scalars["losses/approx_kl"] = approx_kl(logratio)
            scalars["losses/clipfrac"] = ((logratio.exp() - 1).abs() > args.clip_coef).float().mean()
            scalars["losses/explained_variance"] = 1 - (returns - values).var() / returns.var()
            scalars["losses/std"] = agent.actor_logstd.detach().exp().mean()
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/SPS"] = (global_step - first_step) / (now - start_time)  # agent-steps, all costs included
            scalars["charts/rollout_seconds"] = update_start - rollout_start
            scalars["charts/update_seconds"] = now - update_start
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
            content = {"args": asdict(args), "model": agent.state_dict()}
            if score > best_score and save(content, run_dir / "model.pt"):
                best_score, best = score, ", the best so far"
            if best and args.capture_video:
                record(agent.make_policy, env_id, VALIDATION_SEED, run_dir / f"{global_step}.mp4", **env_kwargs)
            per_step = (stats["r"] / stats["l"]).mean()
            tqdm.write(f"step {global_step:,}: held-out return {score:.2f}, {per_step:.3f} a step{best}")

        # Checkpoint
        stopping = average(torch.tensor(float(len(stop)), device=device), world_size) > 0  # on all ranks or none
        if global_step // args.checkpoint_every > last_step // args.checkpoint_every or finished or stopping:
            state = {name: torch.from_numpy(array) for name, array in envs.get_state().items()}
            mine = {"rng": torch.get_rng_state(), "envs": state}
            mine["memory"] = [tensor.cpu() for tensor in (actor_state, critic_state, dones[-1])]
            ranks = [mine] * world_size
            if world_size > 1:
                dist.all_gather_object(ranks, mine)
            checkpoint = {"args": asdict(args), "iteration": iteration, "best_score": best_score, "ranks": ranks}
            checkpoint |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
            if rank == 0:
                writer.flush()  # first, so that the curves reach at least as far as the checkpoint
                save(checkpoint, run_dir / "checkpoint.pt")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # all is saved: what is left can be done again
    envs.close()
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
