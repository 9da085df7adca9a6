"""GRPO with process supervision: a step is judged by the rewards that follow it.

    python grpo_perstep.py      train on Lunar Lander, then compare with a heuristic
        --identical-g, --no-identical-g         all episodes of a group from one state, or each from its own
        --env-id SparseLunarLander              a reward at the end only
        --env-id LunarLander-v3                 Gymnasium's own lander, on forked workers
        --evaluate runs/NAME/model.pt --eval-env-id LunarLander-v3      judged by Gymnasium's own lander
    torchrun --nproc-per-node 2 SCRIPT          data-parallel: each process has groups of its own
    tensorboard --logdir runs

An iteration runs groups of episodes, scores every step against its group instead of a critic, and takes clipped
policy gradients. How it departs from GRPO as published (arXiv 2402.03300):

1. Rewards are normalised over the episodes alive at a time step, not over all at once; their discounted sums, again.
2. Published, all of a group answer the same question; here they start in the same state with --identical-g only.
3. The loss is the mean over a minibatch's steps; published, first over each episode's, so that short ones weigh more.
4. The KL divergence from the reference policy is computed, not estimated, and its weight adapts to a target.
   By default the reference is the policy before the update, so that it holds back single updates only.
5. Advantages are normalised once more in each minibatch, and target_kl ends an update that moves the policy too far.
6. An episode that num_steps cuts off counts for what it got until then: nothing estimates what would have followed.
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # or idle torch threads spin for long on cores that others need

import numpy as np
import torch
import torch.nn as nn

from envs import Run, average, check_args, evaluate_model, flatten, load, make_all, parse_args, setup


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
    eval_every: int = 500_000  # steps between evaluations
    eval_episodes: int = 100  # held-out episodes in an evaluation
    checkpoint_every: int = 500_000  # steps between checkpoints

    env_id: str = "LunarLander"  # any environment with discrete actions, of envs.py or of Gymnasium
    env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # its arguments, as in: gravity -9
    train_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # in training only; 9,5: stages
    stage_returns: str | None = None  # eval/r that ends each stage but the last, as in 5,12; None: equal shares
    eval_env_id: str | None = None  # what policies are evaluated in, None is LunarLander for its variants, else env_id
    eval_env_kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)  # likewise, of eval_env_id
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
    num_minibatches: int = 8  # minibatches in an epoch
    update_epochs: int = 4  # epochs over an iteration's episodes
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # how far the probability ratio may move
    ent_coef: float = 0.0  # weight of the entropy bonus
    kl_coef: float = 0.01  # weight of the KL divergence from the reference policy at the start, then adapted
    kl_coef_target: float = 0.015  # raise that weight when the divergence is above this, lower it when below
    kl_adjust: float = 1.5  # the factor by which it is raised, and divided to be lowered
    ref_update_freq: int = 1  # iterations after which the policy becomes the reference policy
    max_grad_norm: float = 0.5  # largest norm of the gradient
    target_kl: float | None = 0.03  # end an update when the approximate KL divergence exceeds this

    def __post_init__(self):
        check_args(self)
        if self.num_minibatches > self.num_groups * self.group_size:
            allowed = f"it must be at most {self.num_groups * self.group_size}, the number of episodes"
            raise ValueError(f"num_minibatches is {self.num_minibatches}: {allowed}")
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
        n_in = envs.single_observation_space.shape[0]
        n_actions = envs.single_action_space.n
        self.actor = nn.Sequential(
            linear(n_in, args.hidden_dim),
            nn.Tanh(),
            linear(args.hidden_dim, args.hidden_dim),
            nn.Tanh(),
            linear(args.hidden_dim, n_actions, std=0.01),
        )
        self.first_action = envs.single_action_space.start

    def get_policy(self, obs):
        return Categorical(self.actor(obs), self.first_action)

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


def compute_advantages(rewards, alive, gamma):
    """Process supervision: (num_steps, group_size), from rewards and alive, the mask of steps before an episode's end.

    The rewards of a time step are normalised over the episodes that are still alive at it, so that the last one left
    has nothing to be compared with, and gets 0. A step's advantage is the discounted sum of the normalised rewards
    from it on, normalised over all valid steps. Where all are rewarded alike, as in CartPole-v1, it is 0.
    """
    rewards = rewards.double()  # rounding errors must not pass for a spread of 1e-8
    scores = normalize(rewards, alive, dim=1)
    step = scores.clone()
    for t in reversed(range(len(step) - 1)):
        step[t] += gamma * step[t + 1]
    return normalize(step, alive).float()


def compute_loss(agent, args, kl_coef, obs, actions, logprobs, advantages, reference):
    """Of a minibatch: the loss, and without gradients the approximate KL divergence and the terms that are logged."""
    policy = agent.get_policy(obs)
    logratio = policy.log_prob(actions) - logprobs
    ratio = logratio.exp()  # (minibatch,)
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    # Policy loss
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    # KL divergence from the reference policy, whose log-probabilities are (minibatch, n_actions)
    kl = policy.kl(Categorical(reference, agent.first_action)).mean()
    # Entropy
    entropy = policy.entropy().mean()
    loss = pg_loss + kl_coef * kl
    if args.ent_coef:  # or its gradient would be computed for nothing
        loss = loss - args.ent_coef * entropy
    # How far the policy has moved: http://joschu.net/blog/kl-approx.html
    old_approx_kl = (-logratio).mean()
    approx_kl = (ratio - 1 - logratio).mean()
    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
    terms = [pg_loss, entropy, kl, old_approx_kl, approx_kl, clipfrac]
    return loss, approx_kl.detach(), torch.stack(terms).detach()


if __name__ == "__main__":
    args = parse_args(Args, __doc__)
    _, world_size, device = setup(args)

    # Environments first: workers have to be forked before torch starts threads
    num_envs = args.num_groups * args.group_size
    stages = make_all(args, num_envs, args.num_workers, args.env_kwargs, discrete_only=True)
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
    reference = copy.deepcopy(agent)
    kl_coef = args.kl_coef

    # Storage
    shape = (args.num_steps, num_envs)
    obs = torch.zeros((*shape, *envs.single_observation_space.shape), device=device)
    actions = torch.zeros(shape, dtype=torch.int64, device=device)
    rewards = torch.zeros(shape, device=device)
    alive = torch.zeros(shape, dtype=torch.bool, device=device)

    run = Run(args, agent.make_policy, args.total_timesteps, args.eval_env_id, args.eval_env_kwargs)
    iteration = 0
    if run.checkpoint:
        with run.restoring():
            iteration = run.checkpoint["iteration"]
            kl_coef = run.checkpoint["kl_coef"]
            agent.load_state_dict(run.checkpoint["model"])
            reference.load_state_dict(run.checkpoint["reference"])
            optimizer.load_state_dict(run.checkpoint["optimizer"])

    if args.compile:  # and draw the random numbers that are drawn without it
        compute_loss = torch.compile(compute_loss, options={"fallback_random": True})

    while run.step < args.total_timesteps:  # it counts the steps of the episodes, of all processes
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / args.total_timesteps)
        if iteration % args.ref_update_freq == 0:
            reference.load_state_dict(agent.state_dict())
        iteration += 1

        # Rollout: from a seed of its own, so that a checkpoint need not hold the environments' state
        run.clock("rollout")
        envs = stages[run.stage]
        seed = int(torch.randint(2**62, ()))
        observations, _ = envs.reset(seed=seed, options={"identical": args.group_size if args.identical_g else 1})
        running = np.ones(num_envs, bool)  # (num_envs,), whose episode still goes on
        for step in range(args.num_steps):
            obs[step] = to_tensor(observations, device)
            with torch.no_grad():
                policy = agent.get_policy(obs[step])
                actions[step] = policy.sample()
            alive[step] = torch.from_numpy(running)
            observations, reward, _, _, infos = envs.step(policy.squash(actions[step]).cpu().numpy())
            rewards[step] = torch.from_numpy(reward)
            if "episode" in infos:
                run.add_episodes(infos["episode"], running & infos["_episode"])
                running = running & ~infos["_episode"]
                if not running.any():
                    break
        length = step + 1

        # Advantages, group by group
        advantages = torch.zeros((length, num_envs), device=device)
        for first in range(0, num_envs, args.group_size):
            group = slice(first, first + args.group_size)
            advantages[:, group] = compute_advantages(rewards[:length, group], alive[:length, group], args.gamma)

        # Update
        run.clock("update")
        valid = alive[:length].flatten().nonzero().squeeze(-1)  # (batch,), the steps of the episodes
        b_obs = obs[:length].flatten(0, 1).index_select(0, valid)
        b_actions = actions[:length].flatten(0, 1).index_select(0, valid)
        b_advantages = advantages.flatten(0, 1).index_select(0, valid)
        with torch.no_grad():
            b_logprobs = agent.get_policy(b_obs).log_prob(b_actions)
            b_reference = reference.get_policy(b_obs).logprobs  # (batch, n_actions)
        batch = [b_obs, b_actions, b_logprobs, b_advantages, b_reference]
        losses = []  # of every minibatch
        for _ in range(args.update_epochs):
            # Not chunk: in a torchrun every process has as many minibatches, whatever its number of steps
            for mb_inds in torch.randperm(len(b_obs)).to(device).tensor_split(args.num_minibatches):
                minibatch = [x.index_select(0, mb_inds) for x in batch]  # for wide rows faster than x[mb_inds]
                loss, approx_kl, terms = compute_loss(agent, args, kl_coef, *minibatch)
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
        pg_loss, entropy, kl, old_approx_kl, approx_kl, clipfrac = average(torch.stack(losses).mean(0))
        kl_coef *= args.kl_adjust if kl > args.kl_coef_target else 1 / args.kl_adjust
        kl_coef = min(max(kl_coef, 1e-4), 1.0)

        # Log
        scalars = {
            "losses/policy_loss": pg_loss,
            "losses/entropy": entropy,
            "losses/kl": kl,
            "losses/kl_coef": kl_coef,
            "losses/old_approx_kl": old_approx_kl,
            "losses/approx_kl": approx_kl,
            "losses/clipfrac": clipfrac,
            "losses/minibatches": len(losses),  # fewer than all where target_kl ended the update
            "charts/learning_rate": optimizer.param_groups[0]["lr"],
            "charts/episodic_return": (rewards[:length] * alive[:length]).sum(0).mean(),  # of those cut off as well
            "charts/episodic_length": len(b_obs) / num_envs,
            "charts/cut_off": running.mean(),  # the share of episodes that num_steps cut off
        }
        steps = average(torch.tensor(float(len(b_obs)), device=device)) * world_size
        run.log(run.step + round(float(steps)), scalars)
        run.evaluate(agent.state_dict())  # if it is time

        # Checkpoint
        if run.checkpoint_due():
            state = {"iteration": iteration, "kl_coef": kl_coef, "reference": reference.state_dict()}
            state |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
            run.save(state)
        if run.stopping:
            break

    stages.close()
    run.finish(agent)
