"""GRPO with both supervisions: a step is good only if what follows and its whole episode are.

    python grpo_hybrid.py      train on landers that start anywhere, then compare with random actions
        --identical-g, --no-identical-g         all episodes of a group from one state, or each from its own
        --env-id SparseLunarLander              a reward at the end only
        --env-id LunarLander-v3                 Gymnasium's own lander, on forked workers
        --evaluate runs/NAME/model.pt --eval-env-id LunarLander-v3      judged by Gymnasium's own lander
    torchrun --nproc-per-node 2 grpo_hybrid.py    data-parallel: each process has groups of its own
    tensorboard --logdir runs

An iteration runs groups of episodes, scores every step against its group instead of a critic, and takes clipped
policy gradients. How it departs from GRPO as published (arXiv 2402.03300):

1. Of process supervision, that of grpo_perstep.py, and outcome supervision the product; positive only if both are.
2. Published, all of a group answer the same question; here they start in the same state with --identical-g only.
3. The loss is the mean over a minibatch's steps; published, first over each episode's, so that short ones weigh more.
4. The KL divergence from the reference policy is computed, not estimated, and its weight adapts to a target.
5. Advantages are normalised once more in each minibatch, and max_kl ends an update that moves the policy too far.
6. An episode that num_steps cuts off counts for what it got until then: nothing estimates what would have followed.
"""

import copy
import math
import os
import signal
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic CUDA asks for

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from envs import compare, evaluate, load, make_vec, open_run, record, save

VALIDATION_SEED, TEST_SEED = 2**62, 2**62 + 1  # held out: the seeds of training stay below
KL_COEF_BOUNDS = (1e-4, 1.0)


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
    eval_every: int = 500_000  # steps between evaluations
    eval_episodes: int = 100  # held-out episodes in an evaluation
    checkpoint_every: int = 500_000  # steps between checkpoints

    env_id: str = "DenseLunarLander"  # any environment with discrete actions, of envs.py or of Gymnasium
    # further arguments of the environment, as in: --env-kwargs gravity -9 enable_wind True
    env_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    eval_env_id: str | None = None  # what policies are evaluated in, None is LunarLander for its variants, else env_id
    # further arguments of eval_env_id, as in: --eval-env-kwargs gravity -9
    eval_env_kwargs: dict[str, int | float | bool] = field(default_factory=dict)
    num_groups: int = 1  # groups in an iteration, in each process of a torchrun
    group_size: int = 128  # G, episodes in a group; all run side by side
    identical_g: bool = False  # start all episodes of a group from the same state
    num_workers: int | None = None  # processes to step them in; 0 is this one, None picks by what is being stepped

    hidden_dim: int = 128  # width of the layers

    total_timesteps: int = 6_000_000  # steps to train for; those after an episode's end do not count
    learning_rate: float = 2e-3  # the step size of Adam
    num_steps: int = 600  # T, after which an episode is cut off in training
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.997  # discount
    hybrid_alpha: float = 1.0  # exponent of the episode's score
    hybrid_beta: float = 1.0  # exponent of the step's score
    hybrid_clip: float | None = 10.0  # largest product of the two
    num_minibatches: int = 8  # minibatches in an epoch
    update_epochs: int = 4  # epochs over an iteration's episodes
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move
    ent_coef: float = 0.0  # weight of the entropy bonus
    kl_coef: float = 0.01  # weight of the KL divergence from the reference policy at the start, then adapted
    target_kl: float = 0.015  # raise that weight when the divergence is above this, lower it when below
    kl_adjust: float = 1.5  # the factor by which it is raised, and divided to be lowered
    ref_update_freq: int = 1  # iterations after which the policy becomes the reference policy
    max_kl: float | None = 0.03  # end an update when the approximate KL divergence from the old policy exceeds this
    max_grad_norm: float = 0.5  # largest norm of the gradient

    def __post_init__(self):
        limits = {
            "group_size": (2, math.inf),
            "num_groups num_steps num_minibatches update_epochs ref_update_freq": (1, math.inf),
            "eval_every eval_episodes checkpoint_every total_timesteps": (1, math.inf),
            "hidden_dim": (2, math.inf),
            "learning_rate clip_coef max_grad_norm target_kl max_kl": (1e-12, 1e12),
            "ent_coef": (0, 1e12),
            "kl_coef": KL_COEF_BOUNDS,
            "kl_adjust": (1, 1e12),
            "gamma": (0, 1),
            "hybrid_alpha hybrid_beta": (0, 1e12),
            "hybrid_clip": (1e-12, math.inf),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ((name, limit) for names, limit in limits.items() for name in names.split()):
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be from {low} to {high}")
        if self.num_minibatches > self.num_groups * self.group_size:
            most = f"{self.num_groups * self.group_size}, all episodes"
            raise ValueError(f"num_minibatches is {self.num_minibatches}: it must be at most {most}")
        if self.eval_env_id is None:
            variants = ("DenseLunarLander", "SparseLunarLander")  # these start anywhere: to train on
            self.eval_env_id = "LunarLander" if self.env_id in variants else self.env_id
            self.eval_env_kwargs = self.env_kwargs | self.eval_env_kwargs


# -------------------- Network -----------------------------------------------------------------------------------------


def linear(n_in, n_out, std=2**0.5):
    """A layer with orthogonal weights."""
    layer = nn.Linear(n_in, n_out)
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy, and nothing else: there is no critic."""

    def __init__(self, args, envs):
        super().__init__()
        n_in, n_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
        self.actor = nn.Sequential(
            linear(n_in, args.hidden_dim),
            nn.Tanh(),
            linear(args.hidden_dim, args.hidden_dim),
            nn.Tanh(),
            linear(args.hidden_dim, n_actions, std=0.01),
        )
        self.first_action = envs.single_action_space.start

    def get_policy(self, obs):
        return Categorical(self.actor(obs))

    def make_policy(self, envs, greedy=True):
        """The policy on arrays, as envs.py evaluates it: the likeliest action, or one drawn as in training."""
        device, generator = self.actor[0].weight.device, torch.Generator().manual_seed(0)

        @torch.no_grad()
        def act(observations, infos):
            policy = self.get_policy(to_tensor(observations, device))
            actions = policy.logprobs.argmax(-1) if greedy else policy.sample(generator)
            return actions.cpu().numpy() + self.first_action

        return act


class Categorical:
    """Logits (batch, n_actions) as log-probabilities; actions are their indices, (batch,)."""

    def __init__(self, logits):
        self.logprobs = logits.log_softmax(-1)

    def sample(self, generator=None):
        """Draw actions: the argmax of p / E, with E exponentially distributed, is distributed as p (Gumbel's trick)."""
        noise = torch.empty(self.logprobs.shape).exponential_(generator=generator)  # on the CPU, with any device
        return (self.logprobs - noise.log().to(self.logprobs.device)).argmax(-1)

    def log_prob(self, actions):
        return self.logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self):
        return -(self.logprobs.exp() * self.logprobs).sum(-1)

    def kl(self, other):
        """The KL divergence of this policy from another, exactly: (batch,)."""
        return (self.logprobs.exp() * (self.logprobs - other.logprobs)).sum(-1)


def to_tensor(observations, device):
    return torch.as_tensor(observations, dtype=torch.float32, device=device)


# -------------------- Algorithm ---------------------------------------------------------------------------------------


def normalize(x, valid, dim=None):
    """To mean 0 and standard deviation 1 along `dim`, or altogether, over the valid entries only; 0 elsewhere."""
    count = valid.sum(dim, keepdim=True).clamp(min=1)
    centered = (x - (x * valid).sum(dim, keepdim=True) / count) * valid
    return centered / ((centered**2).sum(dim, keepdim=True) / count).sqrt().clamp(min=1e-8)


def compute_advantages(rewards, alive, gamma, alpha, beta, clip):
    """Both: (num_steps, group_size), from rewards and alive, the mask of steps before an episode's end.

    episode (outcome supervision) is the return, undiscounted, normalised over the group. step (process supervision) is
    the discounted sum, from a step on, of rewards that were normalised over the episodes still alive at each time. The
    advantage is positive only where both are, its size |episode|^alpha |step|^beta, clipped; all that normalised. Where
    all are rewarded alike, as in CartPole-v1, it is 0, if beta is not.
    """
    rewards = rewards.double()  # rounding errors must not pass for a spread of 1e-8
    episode = normalize((rewards * alive).sum(0), alive[0])  # (group_size,)
    scores = normalize(rewards, alive, dim=1)
    step, later = torch.zeros_like(scores), 0
    for t in reversed(range(len(scores))):
        step[t] = later = scores[t] + gamma * later
    size = (episode.abs() ** alpha * step.abs() ** beta).clamp(max=math.inf if clip is None else clip)
    return normalize(torch.where((episode > 0) & (step > 0), size, -size), alive).float()


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

    # Environments first: workers have to be forked before torch starts threads
    num_envs = args.num_groups * args.group_size
    envs = make_vec(args.env_id, num_envs, args.num_workers, **args.env_kwargs)
    env_id, env_kwargs = args.eval_env_id, args.eval_env_kwargs  # that policies are evaluated in
    eval_envs = make_vec(env_id, 1, num_workers=0, **env_kwargs)
    for name, world in (("env_id", envs), ("eval_env_id", eval_envs)):
        observes, acts = world.single_observation_space, world.single_action_space
        if not isinstance(acts, gym.spaces.Discrete) or len(observes.shape) != 1:
            allowed = "an environment of vector observations and discrete actions"
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
    policies = {args.exp_name: agent.make_policy, "sampled": partial(agent.make_policy, greedy=False)}
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
    reference, kl_coef = copy.deepcopy(agent), args.kl_coef

    # Storage
    shape = (args.num_steps, num_envs)
    obs = torch.zeros((*shape, *envs.single_observation_space.shape), device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    rewards, alive = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device)

    # The run's folder, a new one or an unfinished run's
    run = [*open_run(asdict(args), world_size)] if rank == 0 else [None, None]
    if world_size > 1:
        dist.broadcast_object_list(run)
    run_dir, checkpoint = run
    iteration, global_step, best_score = 0, 0, -math.inf  # global_step counts the steps of all groups' episodes
    # The ranks begin with the same weights and go on with draws of their own; torch reads only 32 bits of a seed.
    torch.manual_seed((args.seed + rank * 0x9E3779B9) % 2**32)
    if checkpoint:
        iteration, global_step, best_score = (checkpoint[name] for name in ("iteration", "global_step", "best_score"))
        agent.load_state_dict(checkpoint["model"])
        reference.load_state_dict(checkpoint["reference"])
        kl_coef = checkpoint["kl_coef"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["ranks"][rank]["rng"])
    first_step = global_step
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

    stopping, finished, start_time = False, global_step >= args.total_timesteps, time.time()
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit_scale=True, disable=rank > 0)
    while not finished and not stopping:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - global_step / args.total_timesteps)
        if iteration % args.ref_update_freq == 0:
            reference.load_state_dict(agent.state_dict())
        iteration += 1

        # Rollout: a seed of its own, so that a checkpoint need not hold the environments' state
        rollout_start, episodes = time.time(), {}
        seed = int(torch.randint(2**62, ()))
        alike = args.group_size if args.identical_g else 1
        observations, infos = envs.reset(seed=seed, options={"identical": alike})
        running = np.ones(num_envs, bool)  # (num_envs,), whose episode still goes on
        for step in range(args.num_steps):
            obs[step] = to_tensor(observations, device)
            with torch.no_grad():
                actions[step] = agent.get_policy(obs[step]).sample()
            alive[step] = torch.from_numpy(running)
            chosen = actions[step].cpu().numpy() + agent.first_action
            observations, reward, terminations, truncations, infos = envs.step(chosen)
            rewards[step] = torch.from_numpy(reward)
            if "episode" in infos:
                for name, value in infos["episode"].items():
                    episodes.setdefault(name, []).extend(value[running & infos["_episode"]])
                running = running & ~(terminations | truncations)
                if not running.any():
                    break
        length = step + 1
        groups = zip(*(x[:length].split(args.group_size, dim=1) for x in (rewards, alive)), strict=True)
        supervision = (args.gamma, args.hybrid_alpha, args.hybrid_beta, args.hybrid_clip)
        advantages = [compute_advantages(*group, *supervision) for group in groups]
        advantages = torch.cat(advantages, dim=1)  # (length, num_envs)

        # Update
        update_start = time.time()
        valid = alive[:length].flatten().nonzero().squeeze(-1)  # (batch,), the steps of the episodes
        b_obs, b_actions, b_advantages = (
            x[:length].flatten(0, 1).index_select(0, valid) for x in (obs, actions, advantages)
        )
        batch_size = len(valid)
        with torch.no_grad():
            b_logprobs = agent.get_policy(b_obs).log_prob(b_actions)
            b_reference = reference.get_policy(b_obs).logprobs
        minibatches = (
            mb_inds
            for _ in range(args.update_epochs)
            for mb_inds in torch.randperm(batch_size).to(device).tensor_split(args.num_minibatches)
        )
        losses, logratios = [], []  # of every minibatch
        for mb_inds in minibatches:
            # index_select copies whole rows, and is several times faster than b_obs[mb_inds]
            policy = agent.get_policy(b_obs.index_select(0, mb_inds))
            logratio = policy.log_prob(b_actions[mb_inds]) - b_logprobs[mb_inds]
            ratio = logratio.exp()  # (minibatch,)
            mb_advantages = b_advantages[mb_inds]
            if args.norm_adv:
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std(correction=0) + 1e-8)
            pg_loss1 = -mb_advantages * ratio
            pg_loss2 = -mb_advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            pg_loss = torch.max(pg_loss1, pg_loss2).mean()

            kl = policy.kl(Categorical(b_reference.index_select(0, mb_inds))).mean()
            with torch.set_grad_enabled(args.ent_coef > 0):  # at 0 it is only logged, and its gradient a waste of time
                entropy = policy.entropy().mean()
            loss = pg_loss - args.ent_coef * entropy + kl_coef * kl

            losses.append(torch.stack([pg_loss, entropy, kl]).detach())
            logratios.append(logratio.detach())
            if args.max_kl is not None and average(approx_kl(logratios[-1]), world_size) > args.max_kl:
                break
            weights.grad.zero_()
            loss.backward()
            average(weights.grad, world_size)
            nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
            optimizer.step()
        losses = average(torch.stack(losses).mean(0), world_size)
        low, high = KL_COEF_BOUNDS
        kl_coef = min(max(kl_coef * (args.kl_adjust if losses[2] > args.target_kl else 1 / args.kl_adjust), low), high)

        # Log
        steps = round(world_size * float(average(torch.tensor(float(batch_size), device=device), world_size)))
        last_step, global_step, now = global_step, global_step + steps, time.time()
        if rank == 0:
            loss_names = ("policy_loss", "entropy", "kl")
            scalars = {f"losses/{name}": loss for name, loss in zip(loss_names, losses, strict=True)}
            logratio = torch.cat(logratios)
            scalars["losses/kl_coef"] = kl_coef
            scalars["losses/old_approx_kl"] = (-logratio).mean()
            scalars["losses/approx_kl"] = approx_kl(logratio)
            scalars["losses/clipfrac"] = ((logratio.exp() - 1).abs() > args.clip_coef).float().mean()
            scalars["losses/minibatches"] = len(logratios)  # fewer than all where max_kl ended the update
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/SPS"] = (global_step - first_step) / (now - start_time)  # all costs included
            scalars["charts/rollout_seconds"] = update_start - rollout_start
            scalars["charts/update_seconds"] = now - update_start
            returns = (rewards[:length] * alive[:length]).sum(0)  # (num_envs,), of the cut off as well
            scalars["charts/episodic_return"] = returns.mean()
            scalars["charts/episodic_length"] = batch_size / num_envs
            scalars["charts/cut_off"] = running.mean()  # the share of episodes that were still going on
            for name, value in episodes.items():
                if name not in ("r", "l") and value:
                    scalars[f"episode/{name}"] = np.mean(value)  # of those that ended
            for tag, value in scalars.items():
                writer.add_scalar(tag, float(value), global_step)
            progress.update(steps)
            postfix = f"SPS {scalars['charts/SPS']:,.0f}, return {scalars['charts/episodic_return']:.2f}"
            progress.set_postfix_str(postfix, refresh=False)

        # Evaluate
        finished = global_step >= args.total_timesteps
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
            tqdm.write(f"step {global_step:,}: held-out return {score:.2f}, length {stats['l'].mean():.0f}{best}")

        # Checkpoint
        stopping = average(torch.tensor(float(len(stop)), device=device), world_size) > 0  # on all ranks or none
        if global_step // args.checkpoint_every > last_step // args.checkpoint_every or finished or stopping:
            mine = {"rng": torch.get_rng_state()}
            ranks = [mine] * world_size
            if world_size > 1:
                dist.all_gather_object(ranks, mine)
            checkpoint = {"args": asdict(args), "iteration": iteration, "best_score": best_score, "ranks": ranks}
            checkpoint |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint |= {"reference": reference.state_dict(), "kl_coef": kl_coef, "global_step": global_step}
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
