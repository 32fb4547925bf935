"""`pdserve top`: what a cluster does right now, from the manager's picture and everybody's metrics."""
