"""Tables, charts and HTML reports of policies, costs and accuracies."""
