"""Who starts what, and where: on this machine, or inside another launcher's job."""
