# Settings of your cluster beyond sbatch's options. Copy this file to launch/slurm/site.sh, or anywhere else and name it
# in COE_SITE; then keep the lines you need. pretrain.sbatch reads it once, on the job's first node, and passes exported
# variables to all ranks.
# shellcheck shell=bash disable=SC2034

# Modules:
# module purge
# module load python/3.12 cuda/13.0

# A Python environment (default: the repository's .venv if it exists, else python3):
# source /shared/environments/coe/bin/activate                                    # venv
# source /shared/conda/etc/profile.d/conda.sh && conda activate coe               # conda
# COE_PYTHON=$(command -v python)                                                 # in both cases

# The environment of the ranks:
# export NCCL_SOCKET_IFNAME==ib0 GLOO_SOCKET_IFNAME=ib0     # default: the interface of the route between nodes
# export NCCL_IB_HCA=mlx5_0,mlx5_1                          # default: NCCL uses the adapter near each GPU
# export OMP_NUM_THREADS=8

# The folder for logs (default: `logs` in the folder where sbatch was called). It must be visible to all nodes, as must
# the run's output folder:
# export COE_LOGS=/shared/$USER/logs

# Apptainer, or any other command that runs its arguments in a container. The repository and the data must be visible in
# the container:
# COE_CONTAINER=(apptainer exec --nv --bind /shared /shared/images/coe.sif)

# Pyxis: more options of srun. COE_PYTHON is then a Python in the image:
# COE_SRUN=(--container-image=/shared/images/coe.sqsh --container-mounts=/shared:/shared)

# More options of the node check (see launch/check_nodes.py --help), such as the required free memory and bandwidth:
# COE_CHECK=(--memory 64 --bandwidth 20)
