"""What the command does, a file a subcommand; names become functions here and nowhere else."""
