"""What stands between a run and the machines it runs on: networks, attempts, failures. Without torch."""
