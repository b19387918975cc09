"""What training any kind of student needs: settings, data, losses, optimizers, checkpoints, processes."""
