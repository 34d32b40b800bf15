# What your cluster needs beyond sbatch's options. Copy it to launch/slurm/site.sh, or anywhere and name it in COE_SITE,
# and keep the lines you need. pretrain.sbatch reads it once, on the job's first node; what it exports reaches all ranks.
# shellcheck shell=bash disable=SC2034

# Modules:
# module purge
# module load python/3.11 cuda/12.8

# An environment; without one the repository's own .venv is taken where there is one, else python3:
# source /shared/environments/coe/bin/activate                                    # venv
# source /shared/conda/etc/profile.d/conda.sh && conda activate coe               # conda
# COE_PYTHON=$(command -v python)                                                 # in both cases

# The environment of the ranks:
# export NCCL_SOCKET_IFNAME==ib0 GLOO_SOCKET_IFNAME=ib0     # otherwise found by the route from node to node
# export NCCL_IB_HCA=mlx5_0,mlx5_1                          # otherwise NCCL takes, for each GPU, the adapter near it
# export OMP_NUM_THREADS=8

# Where logs go, by default the folder `logs` where sbatch was called; every node must see it, as it must the run's output:
# export COE_LOGS=/shared/$USER/logs

# Apptainer, or any command that runs what follows it in a container (the repository and the data must be visible there):
# COE_CONTAINER=(apptainer exec --nv --bind /shared /shared/images/coe.sif)

# Pyxis: further options of srun. COE_PYTHON is then a Python of the image:
# COE_SRUN=(--container-image=/shared/images/coe.sqsh --container-mounts=/shared:/shared)

# Further options of the node check (launch/check_nodes.py --help), such as how much memory must be free and how fast nodes must talk:
# COE_CHECK=(--memory 64 --bandwidth 20)
