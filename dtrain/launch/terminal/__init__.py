"""What ranks print, on its way to a terminal, a notebook and log files."""
