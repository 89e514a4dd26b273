"""What people look at: terminal tables and charts of policies, costs and accuracies."""
